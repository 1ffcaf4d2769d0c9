"""A language model of the simplest kind behind the real HTTP server.

It repeats its prompt, token by token, then ends. That makes every text known in advance, and lets a
test hold a sequence, or fail it, where it wants to.
"""

import asyncio
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx

from server.api.app import create_app
from server.api.http_server import HTTPServer
from server.api.openai.cells import Cells
from server.cache_salt import CacheSalts
from server.errors import InstanceFailed, NotReady
from server.generation import NO_OPTIONS, Chunk, RequestOptions
from server.models.serving import Serving
from server.text.text import Text
from workers.messages import ModelFacts, SamplingParams, TokenLogprobs

NAME = "org/echo-1"
EOS = 2
ENDS = (0, EOS, 4)
"""All tokens that end an answer, by the tokenizer's file: the end of a text, of a turn, and the
name of another repository."""
DEADLINE_S = 300.0
FACTS = ModelFacts(
    architecture="echo",
    dtype="none",
    vocab_size=49152,
    max_model_len=256,
    eos_token_ids=(EOS,),
    num_parameters=0,
    weights_bytes=0,
    kv_bytes_per_token=0,
)


class EchoModel:
    """Repeats the prompt from its first token on; then EOS, or from the start if that is ignored;
    or the only token that it may.

    Its settings may be changed by a test's thread at any time and hold for later sequences.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.num_ready = 1
        self.asleep = False
        self.refusals: list[Exception | None] = []  # of the next submits, in order
        self.hold_after: int | None = None  # tokens, after which a sequence waits until closed
        self.fail_after: int | None = None
        self.failure: Exception = InstanceFailed("An instance was lost.")
        self.tokens_per_chunk = 1
        self.wait_for: threading.Barrier | None = None
        self.submitted: list[tuple[str, list[int], SamplingParams]] = []
        self.options: list[RequestOptions] = []  # of each submit
        self.aborted: queue.Queue[str] = queue.Queue()
        self.num_open = 0

    @property
    def facts(self) -> ModelFacts:
        if not self.num_ready:
            raise NotReady("The model is being loaded.", retry_after_s=3)
        return FACTS

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
    ) -> "EchoStream":
        if self.refusals and (refusal := self.refusals.pop(0)) is not None:
            raise refusal
        self.submitted.append((request_id, list(token_ids), sampling))
        self.options.append(options)
        self.num_open += 1
        return EchoStream(self, request_id, token_ids, sampling)


class EchoStream:
    def __init__(
        self,
        model: EchoModel,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
    ):
        self._model = model
        self._request_id = request_id
        self._prompt = list(token_ids)
        self._sampling = sampling
        self._open = True
        self._finished = False
        self._is_first = True

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        model, sampling, made = self._model, self._sampling, 0
        tokens: list[int] = []
        if model.wait_for is not None:
            await asyncio.to_thread(model.wait_for.wait, DEADLINE_S)
        while not self._finished:
            if made == model.hold_after:
                await asyncio.Event().wait()
            if made == model.fail_after:
                raise model.failure
            token = self._prompt[made] if made < len(self._prompt) else EOS
            if sampling.ignore_eos:
                token = self._prompt[made % len(self._prompt)]
            if sampling.allowed_token_ids is not None and len(sampling.allowed_token_ids) == 1:
                token = sampling.allowed_token_ids[0]
            made += 1
            tokens.append(token)
            stopped = not sampling.ignore_eos and token in (EOS, *sampling.stop_token_ids)
            self._finished = stopped or made == sampling.max_tokens
            if self._finished or len(tokens) == model.tokens_per_chunk:
                reason = "stop" if stopped else "length" if self._finished else None
                yield self._chunk(tuple(tokens), reason)
                tokens = []

    def _chunk(self, tokens: tuple[int, ...], reason: Any) -> Chunk:
        sampling, of_prompt = self._sampling, self._prompt[1:] if self._is_first else []
        self._is_first = False
        return Chunk(
            tokens,
            reason,
            tuple(
                logprobs_of(token, sampling.logprobs)
                for token in tokens
                if sampling.logprobs is not None
            ),
            tuple(
                logprobs_of(token, sampling.prompt_logprobs)
                for token in of_prompt
                if sampling.prompt_logprobs is not None
            ),
        )

    async def aclose(self) -> None:
        if not self._open:
            return
        self._open = False
        self._model.num_open -= 1
        if not self._finished:
            self._model.aborted.put(self._request_id)


def logprobs_of(token: int, count: int | None) -> TokenLogprobs:
    """What this model says of a token: the lower its id, the likelier it was."""
    likeliest = tuple(range(1000, 1000 + (count or 0)))
    return TokenLogprobs(
        logprob=-token / 64,
        rank=token + 1,
        top_ids=likeliest,
        top_logprobs=tuple(-other / 64 for other in likeliest),
    )


@contextmanager
def echo_server(
    model: EchoModel,
    text: Text,
    *,
    max_body_bytes: int = 1 << 20,
    app_options: Mapping[str, Any] | None = None,
    salts: CacheSalts | None = None,
    others: Mapping[str, EchoModel] | None = None,
    **options: Any,
) -> Iterator[str]:
    """The server over the model, and `others` by name, at this address. `options` are those of
    `HTTPServer`."""
    listening = socket.create_server(("127.0.0.1", 0))
    started: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        cells = Cells()
        served = {
            name: Serving(model_name=name, generator=one, text=text, created=1_700_000_000)
            for name, one in {NAME: model, **(others or {})}.items()
        }
        app = create_app(
            lambda: served,
            cells,
            salts=salts,
            max_body_bytes=max_body_bytes,
            **(app_options or {}),
        )
        server = HTTPServer(app, listening, **options)
        stop = asyncio.Event()
        await server.start()
        loop = asyncio.get_running_loop()
        started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
        await stop.wait()
        await server.close()
        cells.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    stop = started.result(DEADLINE_S)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error body that every error has."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"model": NAME, "prompt": "One two.", **fields})


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "One two."}]
    return http.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **fields})


def events(response: httpx.Response) -> list[Any]:
    """The decoded events of a stream that ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]
