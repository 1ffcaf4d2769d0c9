"""Every field that somebody's API has for a request, and what becomes of it here.

Owns the table. Invariant: a field is *used*, or it can't change the answer and is *ignored*, or it
is *refused* by name unless its value asks for nothing; what is in no table is refused likewise.
Schemas say what used ones may hold. docs/api.md shows the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from server.errors import InvalidRequest

Place = Literal["completions", "chat", "embeddings", "message"]
"""Of which body, or a chat's messages."""
_TEXTS: Final[tuple[Place, ...]] = ("completions", "chat")
_ALL: Final[tuple[Place, ...]] = ("completions", "chat", "embeddings")
_ASKS_FOR_NOTHING: Final[tuple[Any, ...]] = (False, 0, 0.0, "", [], {})
"""Of a field that nobody knows; null, too."""


@dataclass(frozen=True)
class UnusedField:
    """One that no schema has."""

    name: str
    places: tuple[Place, ...]
    owners: str
    neutral: tuple[Any, ...] | None
    """The values that ask for nothing, besides null. None: it is ignored, whatever it holds."""
    instead: str = ""
    """What to do where it is refused, or why it is ignored."""


def _refused(
    owners: str,
    names: str,
    *neutral: Any,
    instead: str = "Omit it.",
    places: tuple[Place, ...] = _TEXTS,
) -> list[UnusedField]:
    return [UnusedField(name, places, owners, neutral, instead) for name in names.split()]


def _ignored(
    owners: str, names: str, why: str, places: tuple[Place, ...] = _TEXTS
) -> list[UnusedField]:
    return [UnusedField(name, places, owners, None, why) for name in names.split()]


_CHAT: Final[tuple[Place, ...]] = ("chat",)
_COMPLETIONS: Final[tuple[Place, ...]] = ("completions",)
_EMBEDDINGS: Final[tuple[Place, ...]] = ("embeddings",)
_MESSAGE: Final[tuple[Place, ...]] = ("message",)

_FORM: Final = "Use response_format or structured_outputs."
_LENGTH: Final = "Use max_tokens."
_THINKING: Final = "Use chat_template_kwargs."
_NOT_KEPT: Final = "nothing of a request is kept"
_ONE_KIND: Final = "means nothing without a field that is refused"

UNUSED: Final[tuple[UnusedField, ...]] = (
    # --- what can't change an answer
    *_ignored("OpenAI", "metadata store", _NOT_KEPT),
    *_ignored("OpenAI", "safety_identifier", "says who asks", _ALL),
    *_ignored("OpenAI", "service_tier", "there is one, and `priority`"),
    *_ignored(
        "OpenAI", "prompt_cache_key prompt_cache_retention", "what was computed is found anyway"
    ),
    *_ignored("vLLM, SGLang", "request_id rid", "a request is named by the server", _ALL),
    *_ignored("SGLang", "data_parallel_rank routed_dp_rank", "the least loaded instance is taken"),
    *_ignored("vLLM", "guided_decoding_backend", "there is one"),
    *_ignored("vLLM, SGLang", "spaces_between_special_tokens", "no text shows special tokens"),
    *_ignored("vLLM", "truncation_side", _ONE_KIND),
    *_ignored("llama-server", "cache_prompt id_slot n_cache_reuse", "a way to the same answer"),
    *_ignored("llama-server, Ollama", "keep_alive num_gpu num_thread", "a way to the same answer"),
    *_ignored(
        "llama-server",
        "dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers xtc_threshold "
        "dynatemp_exponent mirostat_eta mirostat_tau",
        _ONE_KIND,
    ),
    *_ignored("SGLang", "stream_reasoning", _ONE_KIND, _CHAT),
    *_ignored("Anthropic", "cache_control", "what was computed is found anyway", _MESSAGE),
    # --- OpenAI's
    *_refused("OpenAI", "audio prediction web_search_options"),
    *_refused("OpenAI", "function_call", "none", "auto"),
    *_refused("OpenAI", "functions", [], instead="Use tools, with tool_choice 'none'."),
    *_refused("OpenAI", "modalities", ["text"]),
    *_refused("OpenAI", "parallel_tool_calls", True),
    *_refused("OpenAI", "verbosity", "medium"),
    *_refused("OpenAI", "suffix", ""),
    *_refused("OpenAI", "max_completion_tokens", instead=_LENGTH, places=_COMPLETIONS),
    *_refused("OpenAI", "top_logprobs", 0, instead="Use logprobs.", places=_COMPLETIONS),
    *_refused("OpenAI", "messages", instead="Use /v1/chat/completions.", places=_COMPLETIONS),
    *_refused("OpenAI", "prompt", "", instead="Use messages.", places=_CHAT),
    *_refused("OpenAI", "tools", [], instead="Use /v1/chat/completions.", places=_COMPLETIONS),
    *_refused("OpenAI", "tool_choice", "none", "auto", places=_COMPLETIONS),
    *_refused("OpenAI", "reasoning_effort", places=_COMPLETIONS),
    # --- vLLM's
    *_refused("vLLM", "bad_words logits_processors logprob_token_ids", []),
    *_refused("vLLM", "chat_template", instead="Start the server with --chat-template FILE."),
    *_refused("vLLM", "chat_template_kwargs documents", {}, [], places=_COMPLETIONS),
    *_refused("vLLM", "add_generation_prompt", True, places=_COMPLETIONS),
    *_refused("vLLM", "continue_final_message", False, places=_COMPLETIONS),
    *_refused("vLLM", "echo", False, places=_CHAT),
    *_refused("vLLM", "guided_whitespace_pattern structural_tag", instead=_FORM),
    *_refused("vLLM", "include_reasoning", True),
    *_refused("vLLM, SGLang", "include_stop_str_in_output no_stop_trim", False),
    *_refused("vLLM", "kv_transfer_params vllm_xargs media_io_kwargs mm_processor_kwargs", {}),
    *_refused("vLLM", "length_penalty", 1, 1.0),
    *_refused("vLLM", "prompt_embeds", []),
    *_refused("vLLM", "repetition_detection", {}),
    *_refused(
        "vLLM", "return_tokens_as_token_ids", False, instead="Use return_token_ids for the ids."
    ),
    *_refused("vLLM, SGLang", "skip_special_tokens", True, instead="Use return_token_ids."),
    *_refused("vLLM", "thinking_token_budget truncate_prompt_tokens"),
    *_refused("vLLM", "use_beam_search", False),
    # --- SGLang's
    *_refused("SGLang", "regex ebnf json_schema", "", instead=_FORM),
    *_refused("SGLang", "stop_regex", "", [], instead="Use stop."),
    *_refused("SGLang", "separate_reasoning", False),
    *_refused("SGLang", "extra_key", "", instead="Use cache_salt."),
    *_refused("SGLang", "lora_path custom_logit_processor session_params custom_params"),
    *_refused("SGLang", "bootstrap_host bootstrap_port bootstrap_room"),
    *_refused(
        "SGLang", "return_hidden_states return_routed_experts return_cached_tokens_details", False
    ),
    *_refused("SGLang", "sampling_params", {}, instead="Name its fields beside 'model'."),
    *_refused("SGLang", "max_new_tokens", instead=_LENGTH),
    *_refused("SGLang", "min_new_tokens", 0, instead="Use min_tokens."),
    *_refused("SGLang", "return_logprob", False, instead="Use logprobs."),
    *_refused("SGLang", "top_logprobs_num", 0, instead="Use logprobs."),
    *_refused("SGLang", "logprob_start_len", -1, instead="Use prompt_logprobs."),
    *_refused("SGLang", "input_ids", [], instead="Give them as the prompt."),
    # --- llama-server's, and Ollama's
    *_refused("llama-server", "grammar", "", instead=_FORM),
    *_refused("llama-server, Ollama", "n_predict num_predict", -1, instead=_LENGTH),
    *_refused("llama-server", "n_probs", 0, instead="Use logprobs."),
    *_refused(
        "llama-server, Ollama", "repeat_penalty", 1, 1.0, instead="Use repetition_penalty."
    ),
    *_refused("llama-server, Ollama", "typical_p tfs_z", 1, 1.0),
    *_refused("llama-server, Ollama", "mirostat", 0),
    *_refused(
        "llama-server",
        "dry_multiplier dynatemp_range xtc_probability min_keep n_keep n_discard n_indent "
        "t_max_predict_ms",
        0,
        0.0,
    ),
    *_refused("llama-server", "top_n_sigma", -1, -1.0),
    *_refused("llama-server, Ollama", "repeat_last_n", -1),
    *_refused("llama-server, Ollama", "penalize_newline penalize_nl", True),
    *_refused("llama-server", "samplers lora response_fields", []),
    *_refused("llama-server", "post_sampling_probs timings_per_token return_progress", False),
    *_refused("llama-server", "return_tokens", False, instead="Use return_token_ids."),
    *_refused("llama-server", "reasoning_format", "none"),
    *_refused("llama-server", "parse_tool_calls", False),
    *_refused("llama-server, Ollama", "image_data images context", []),
    *_refused("Ollama", "options", {}, instead="Name its fields beside 'model'."),
    *_refused("Ollama", "num_ctx", instead="Start the server with --max-model-len."),
    *_refused("Ollama", "num_keep", 0),
    *_refused("Ollama", "format", "", instead=_FORM),
    *_refused("Ollama", "system template", ""),
    *_refused("Ollama", "raw", False, instead="Use /v1/completions."),
    *_refused("Ollama", "think", False, instead=_THINKING),
    *_refused("others", "enable_thinking thinking thinking_budget", instead=_THINKING),
    # --- of embeddings
    *_refused("vLLM", "add_special_tokens", True, places=_EMBEDDINGS),
    *_refused("vLLM", "chat_template messages mm_processor_kwargs", places=_EMBEDDINGS),
    *_refused("vLLM", "normalize pooling", places=_EMBEDDINGS),
    *_refused("vLLM", "truncation_side", "right", places=_EMBEDDINGS),
    *_ignored("vLLM", "priority", "there is no order of embeddings", _EMBEDDINGS),
    *_refused("others", "prompt_name input_type", instead="Write it into the text.",
              places=_EMBEDDINGS),
    # --- of a chat's messages
    *_refused("OpenAI", "audio function_call", places=_MESSAGE),
    *_refused("OpenAI", "refusal", "", instead="Give it as content.", places=_MESSAGE),
    *_refused("OpenAI", "annotations", [], places=_MESSAGE),
    *_refused("Ollama", "images", [], places=_MESSAGE),
    *_refused("Ollama", "tool_name", instead="Use name.", places=_MESSAGE),
    *_refused(
        "others", "prefix partial", False, instead="Use continue_final_message.", places=_MESSAGE
    ),
)  # fmt: skip

_BY_PLACE: Final[Mapping[Place, Mapping[str, UnusedField]]] = MappingProxyType(
    {
        place: {field.name: field for field in UNUSED if place in field.places}
        for place in (*_ALL, "message")
    }
)


def check_unused(given: Mapping[str, Any], place: Place, where: str = "") -> None:
    """Raises `InvalidRequest` for a field that would have to be ignored and asks for something.
    `given`: what no schema takes; `where` begins the name that the error tells."""
    for name, value in given.items():
        known = _BY_PLACE[place].get(name)
        if value is None or (known is not None and known.neutral is None):
            continue
        neutral = _ASKS_FOR_NOTHING if known is None else known.neutral or ()
        if any(type(value) is type(one) and value == one for one in neutral):
            continue
        shown = f"{where}{name[:100]}"
        if known is None:
            raise InvalidRequest(f"{shown!r} isn't known here. Omit it.", param=shown)
        allowed = f" (other than {neutral[0]!r})" if neutral else ""
        raise InvalidRequest(
            f"{shown!r}{allowed} isn't supported here. {known.instead}", param=shown
        )
