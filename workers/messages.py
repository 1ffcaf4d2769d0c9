"""What the server and an instance say to each other: tokens in, tokens out.

Owns the wire types of the engine socket (ZeroMQ, one msgpack frame a message), one union per
direction. Invariant: every message is bounded and validated when it is decoded, so the code behind
it never meets an unknown field or a wrong type. Does not know text: a prompt is token ids.
"""

from typing import Annotated, Final, Literal

import msgspec

from workers.settings import EngineSettings

PROTOCOL_VERSION: Final = 7
MAX_FRAME_BYTES: Final = 16 << 20
"""Longer frames are refused unread; a million token ids take at most 5 MiB."""

Problem = Literal["", "deadline", "no_room"]
FinishReason = Literal["stop", "length", "abort", "error"]
Task = Literal["generate", "embed"]
"""What a model is for: tokens that follow, or one vector for each text."""
Bounded = Annotated[str, msgspec.Meta(max_length=4096)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=0)]
MAX_LOGPROBS: Final = 20
"""The most tokens for which a request may ask the log probabilities at each position."""
MAX_GRAMMAR_BYTES: Final = 1 << 16
MAX_TOKEN_RULES: Final = 1024
"""The most entries of `logit_bias` and of `allowed_token_ids`."""
MAX_EMBED_INPUTS: Final = 256
"""The most texts of one `Embed`, so that its vectors fit into a frame."""


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything on the wire."""


GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


class GrammarSpec(Message, frozen=True):
    """What the generated text must match. `source` is a JSON schema, a regular expression, a JSON
    array of strings (choice) or a grammar in Lark's notation; nothing for `json_object`."""

    kind: GrammarKind
    source: Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_BYTES)] = ""


class SamplingParams(Message, frozen=True):
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, a
    `repetition_penalty` of 1 and other penalties of 0 are off.

    The random number of the i-th generated token depends on (`seed`, i) alone, so that the same
    seed gives the same text whatever else is in the batch, and on whichever instance: as far as
    rounding, which differs with the batch's size and after a move, does not decide between two
    tokens. In float32 that is rare, in bfloat16 it is not.

    `logprobs` None asks for none, 0 for those of the chosen tokens alone; `prompt_logprobs`
    likewise for the prompt's. No end token is chosen before `min_tokens` have been generated.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]],
        msgspec.Meta(max_length=MAX_TOKEN_RULES),
    ] = {}
    allowed_token_ids: (
        Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=MAX_TOKEN_RULES)]
        | None
    ) = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0
    stop_token_ids: tuple[TokenId, ...] = ()
    min_tokens: Count = 0
    ignore_eos: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    grammar: GrammarSpec | None = None


# --- server → instance


class Generate(Message, tag="generate", frozen=True):
    """Start a sequence. The last `num_generated` of `token_ids` were generated before, by an
    instance that is gone; `sampling.max_tokens` still counts all generated tokens.

    Of the waiting, the lowest `priority` goes first. What is not finished `deadline_s` seconds
    after it came ends with an error. Only requests of the same `cache_salt` share what was computed
    of a common beginning."""

    request_id: Bounded
    token_ids: tuple[TokenId, ...]
    sampling: SamplingParams
    num_generated: Count = 0
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    deadline_s: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    cache_salt: Bounded = ""


class Embed(Message, tag="embed", frozen=True):
    """Compute a vector for each of `inputs`, which hold the special tokens already. `dimensions`
    keeps so many of its first numbers; 0 keeps all. `deadline_s` as in `Generate`."""

    request_id: Bounded
    inputs: Annotated[
        tuple[Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)], ...],
        msgspec.Meta(min_length=1, max_length=MAX_EMBED_INPUTS),
    ]
    dimensions: Count = 0
    deadline_s: Annotated[float, msgspec.Meta(gt=0.0)] | None = None


class Abort(Message, tag="abort", frozen=True):
    """Stop a sequence and free its memory. Answered by nothing; unknown ids are ignored."""

    request_id: Bounded


class Drain(Message, tag="drain", frozen=True):
    """Finish what runs, take nothing new, then exit with status 0."""


ToInstance = Generate | Embed | Abort | Drain


# --- instance → server


class Loading(Message, tag="loading", frozen=True):
    """Progress of the weights. `writer` is true in the one instance that copies them in; who waits
    says which process does."""

    num_bytes: Count
    total_bytes: Count
    writer: bool
    writer_pid: Count = 0


class ModelFacts(Message, frozen=True):
    """What a server needs to know of the loaded model to admit requests."""

    architecture: Bounded
    dtype: Bounded
    vocab_size: Count
    max_model_len: Count
    eos_token_ids: tuple[TokenId, ...]
    num_parameters: Count
    weights_bytes: Count
    kv_bytes_per_token: Count
    task: Task = "generate"
    embedding_size: Count = 0
    """Numbers of a vector, where the task is to embed."""


class Ready(Message, tag="ready", frozen=True):
    """The instance answers requests from now on.

    `startup_ms` maps a phase of the start to its length; `loaded` says whether this instance copied
    the weights in (a cold start) or attached to a sealed set, the one under the key `weight_set`.
    `metadata` lies in that set: all that is needed to build the model on it, without its files.
    `cpu_kernels` names the native decoder's, "" where others compute the model. `rank_pids` are
    the processes that compute it with this one, in the order of their ranks.
    """

    version: int
    pid: int
    facts: ModelFacts
    loaded: bool
    weight_set: Bounded
    startup_ms: dict[str, float]
    metadata: dict[str, str] = {}
    cpu_kernels: Bounded = ""
    rank_pids: tuple[Count, ...] = ()


class StartFailed(Message, tag="start_failed", frozen=True):
    """The instance can't serve this model, and exits. `message` names the fix."""

    code: Bounded
    message: Annotated[str, msgspec.Meta(max_length=65536)]


class TokenLogprobs(Message, frozen=True):
    """The natural logarithms of probabilities at one position: of the token that is there, and of
    the likeliest ones, in falling order. `rank` 1 is the likeliest token.

    They are the model's own: before temperature, penalties, biases and grammars.
    """

    logprob: float
    rank: Annotated[int, msgspec.Meta(ge=1)]
    top_ids: tuple[TokenId, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Output(Message, tag="tokens", frozen=True):
    """New tokens of one sequence. The token that ended it (end of sequence, or one of
    `stop_token_ids`) is the last of `token_ids` when `finish_reason` is "stop".

    `logprobs` has an entry for each of `token_ids` if the request asked for them, else none.
    `prompt_logprobs` comes piece by piece as the prompt is computed, before the first token or
    with it: an entry for each token of the prompt but the first. `invalid` says of an error that
    the request is to blame, not the instance."""

    request_id: Bounded
    token_ids: tuple[TokenId, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    invalid: bool = False
    problem: Problem = ""
    """Which error it is, where a client can do something about it."""
    num_cached: Count = 0
    """Tokens of the prompt that were not computed but found, said with the first new token."""
    error: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class Embedded(Message, tag="embedded", frozen=True):
    """All vectors of one `Embed`, in the order of its inputs, or why there are none.

    `vectors` holds num_inputs * size float32, little-endian. `invalid` as in `Output`."""

    request_id: Bounded
    vectors: bytes = b""
    invalid: bool = False
    error: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class StepOutput(Message, tag="step", frozen=True):
    """All that one engine step gave, the load after it, and counts since the start."""

    outputs: tuple[Output | Embedded, ...]
    num_running: Count
    num_waiting: Count
    kv_bytes: Count
    num_preempted: Count = 0
    prompt_tokens: Count = 0
    """Of all prompts that were looked up in the prefix cache."""
    cached_tokens: Count = 0
    """Those of them that were found there."""
    drafted_tokens: Count = 0
    """That were computed on trial."""
    accepted_tokens: Count = 0
    """Those of them that were right."""


FromInstance = Loading | Ready | StartFailed | StepOutput


# --- server → forkserver, and back (a private socket pair)


class InstanceSpec(Message, frozen=True):
    """All that an instance is told at its start. `requested_at` is CLOCK_MONOTONIC, in seconds, at
    the moment somebody wanted it. The instance listens at `engines`, for `server_pid` alone.
    `tokenizer` is the tokenizer.json that grammars need, "" where there is none; it is not read
    before the first of them comes. `weight_set` is the key of the set that is to be attached,
    whatever has become of the files at `model`; "" loads what lies there."""

    name: Bounded
    runtime_dir: Bounded
    engines: Bounded
    server_pid: Annotated[int, msgspec.Meta(ge=1)]
    model: Bounded
    served_model_name: Bounded
    requested_at: float
    settings: EngineSettings
    num_threads: Annotated[int, msgspec.Meta(ge=1)]
    """As `settings.threads` says, else the fewest: its part of the cores that all share."""
    tokenizer: Bounded = ""
    weight_set: Bounded = ""
    eos_token_ids: tuple[TokenId, ...] | None = None
    """Of that set's model; None leaves them to its files."""
    hang_timeout_s: Annotated[float, msgspec.Meta(ge=0.0)] = 3.0
    """For how long somebody may have stopped one of its processes; 0: for ever."""


class Start(Message, tag="start", frozen=True):
    """Fork an instance. Two descriptors come along: the pipe that it ends with, and its pulse.
    Answered by Started."""

    spec: InstanceSpec


class Up(Message, tag="up", frozen=True):
    """The forkserver has imported what instances need, after `import_ms`."""

    pid: int
    import_ms: float


class Started(Message, tag="started", frozen=True):
    """The instance's process runs."""

    name: Bounded
    pid: int


class Exited(Message, tag="exited", frozen=True):
    """The instance's process ended: `status` is its exit status, or minus the signal's number."""

    name: Bounded
    pid: int
    status: int


FromForkserver = Up | Started | Exited

# --- estimate → server (one JSON document, the output of `python -m workers.estimate`)


class RankEstimate(Message, frozen=True):
    """What each rank holds where the ranks of an instance are on devices of their own, in bytes.

    The first three count tensors: this rank's part of those split by columns and by rows, and those
    that every rank holds whole."""

    column_bytes: Count
    row_bytes: Count
    replicated_bytes: Count
    segment_bytes: Count
    kv_bytes_per_token: Count
    kv_bytes_per_sequence: Count


class OffloadEstimate(Message, frozen=True):
    """Which layers are not in memory, in bytes: what their slots take of each instance, and what is
    read in each pass. Bytes a second that this machine reads of the files and of its memory; 0 is
    not known."""

    num_layers: Count
    num_offloaded: Count
    slots_bytes: Count
    pass_bytes: Count
    read_bytes_per_s: Count
    memory_bytes_per_s: Count


class Estimate(Message, frozen=True):
    """What a model will take, from its headers alone, in bytes.

    `max_model_len` is the length that was asked for, or the model's own, and that of a full
    sequence. `prefill_bytes` is what a step of as many prompt tokens as the budget allows keeps for
    itself while it runs, `logits_bytes_per_sequence` what each sequence adds to a step that chooses
    tokens. `sums_bytes` is what an instance of several ranks takes for their sums. `slot_bytes` is
    what a slot for any layer takes, 0 where none can be offloaded, and `stays_because` says why.
    `rank` is there where a model is divided among more than one, `offload` where layers are
    offloaded: `segment_bytes` is what stays then."""

    architecture: Bounded
    dtype: Bounded
    num_parameters: Count
    num_tensors: Count
    max_model_len: Count
    segment_bytes: Count
    kv_bytes_per_token: Count
    kv_bytes_per_sequence: Count
    prefill_bytes: Count
    logits_bytes_per_sequence: Count
    rank: RankEstimate | None
    offload: OffloadEstimate | None = None
    sums_bytes: Count = 0
    slot_bytes: Count = 0
    stays_because: str = ""


# --- greedy tokens and a reference's word on them (JSON, `python -m workers.conformance.program`)

Verdict = Literal["same", "tie", "differs"]
GENERATES_NOTHING_STATUS: Final = 4
"""How that process ends where the model is for something else."""


class GreedyRequest(Message, frozen=True):
    """Generate `num_new` tokens behind each prompt, and ask `against`, run by the interpreter
    `python`, what it would have chosen in the place of each."""

    model: Bounded
    dtype: Bounded
    prompts: tuple[tuple[TokenId, ...], ...]
    num_new: Count
    against: Literal["transformers", "llama.cpp"]
    python: Bounded


class EvaluationRequest(Message, frozen=True):
    """How well do these models predict the windows of a text, and how far are they from the
    reference?"""

    models: Annotated[tuple[Bounded, ...], msgspec.Meta(min_length=1, max_length=64)]
    reference: Bounded | None
    dtype: Bounded
    weights: Bounded
    """Of the models; the reference's are expanded."""
    kv_cache_dtype: Bounded
    """Of the models; the reference's is auto."""
    windows: Annotated[
        tuple[Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=2)], ...],
        msgspec.Meta(min_length=1),
    ]


class WindowScore(Message, frozen=True):
    """Of one model and one window: sums over its tokens but the first (see
    `workers/evaluation/likelihood.py`)."""

    model: Count
    window: Count
    num_tokens: Count
    loss: float
    divergence: float
    num_same: Count


class ComparedPrompt(Message, frozen=True):
    """Our tokens; the reference's choice at each, given all of ours before it; how far above ours
    that is for it (in logits), and what to make of that."""

    token_ids: tuple[TokenId, ...]
    reference_ids: tuple[TokenId, ...]
    gaps: tuple[float, ...]
    verdicts: tuple[Verdict, ...]


class GreedyComparison(Message, frozen=True):
    """Of all prompts, by which reference, and how ours were computed."""

    dtype: Bounded
    computed_by: Bounded
    reference: Bounded
    prompts: tuple[ComparedPrompt, ...]


_encoder = msgspec.msgpack.Encoder()
_estimate: msgspec.json.Decoder[Estimate] = msgspec.json.Decoder(Estimate)
_evaluation_request: msgspec.json.Decoder[EvaluationRequest] = msgspec.json.Decoder(
    EvaluationRequest
)
_window_score: msgspec.json.Decoder[WindowScore] = msgspec.json.Decoder(WindowScore)
_greedy_request: msgspec.json.Decoder[GreedyRequest] = msgspec.json.Decoder(GreedyRequest)
_greedy: msgspec.json.Decoder[GreedyComparison] = msgspec.json.Decoder(GreedyComparison)
_to_instance: msgspec.msgpack.Decoder[ToInstance] = msgspec.msgpack.Decoder(ToInstance)
_from_instance: msgspec.msgpack.Decoder[FromInstance] = msgspec.msgpack.Decoder(FromInstance)
_start: msgspec.msgpack.Decoder[Start] = msgspec.msgpack.Decoder(Start)
_from_forkserver: msgspec.msgpack.Decoder[FromForkserver] = msgspec.msgpack.Decoder(FromForkserver)


def encode(message: Message) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_to_instance(frame: bytes) -> ToInstance:
    """Raises `msgspec.ValidationError` or `msgspec.DecodeError` on anything but a valid message."""
    return _to_instance.decode(frame)


def decode_from_instance(frame: bytes) -> FromInstance:
    """Raises `msgspec.ValidationError` or `msgspec.DecodeError` on anything but a valid message."""
    return _from_instance.decode(frame)


def decode_start(frame: bytes) -> Start:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _start.decode(frame)


def decode_from_forkserver(frame: bytes) -> FromForkserver:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _from_forkserver.decode(frame)


def decode_estimate(document: bytes) -> Estimate:
    """Raises `msgspec.DecodeError` on anything but a valid document."""
    return _estimate.decode(document)


def decode_evaluation_request(document: bytes) -> EvaluationRequest:
    """Raises `msgspec.DecodeError` on anything but a valid document."""
    return _evaluation_request.decode(document)


def decode_window_score(document: bytes) -> WindowScore:
    """Raises `msgspec.DecodeError` on anything but a valid document."""
    return _window_score.decode(document)


def decode_greedy_request(document: bytes) -> GreedyRequest:
    """Raises `msgspec.DecodeError` on anything but a valid document."""
    return _greedy_request.decode(document)


def decode_greedy_comparison(document: bytes) -> GreedyComparison:
    """Raises `msgspec.DecodeError` on anything but a valid document."""
    return _greedy.decode(document)
