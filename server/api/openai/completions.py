"""`POST /v1/completions`: prompts as text or token ids; `n` choices of the answer for each."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.openai.admission import Front, Start, end_tokens, new_id, submit_all
from server.api.openai.answer import EventStream, collect
from server.api.openai.body_reader import BodyReader
from server.api.openai.logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from server.api.openai.rendering import aside, event, num_entries, response
from server.api.openai.replies import Completion, CompletionChoice, Reply, Usage
from server.api.openai.sampling import check_fits, check_token_ids, sampling_for
from server.api.openai.schemas import MAX_PROMPTS, CompletionRequest, texts_or_ids
from server.api.openai.sequence import Answer, Delta, TextSequence, merged
from server.api.openai.structured import grammar_for
from server.errors import InvalidRequest
from server.models.serving import Serving
from server.text.incremental import Detokenizer, num_unfinished
from server.text.text import Text
from workers.messages import GrammarSpec, SamplingParams, TokenLogprobs

DEFAULT_MAX_TOKENS: Final = 16


@dataclass(frozen=True)
class _Prompt:
    """As it came, and its tokens."""

    written: str | None
    """None where it came as token ids."""
    token_ids: list[int]

    def detokenizer(self, text: Text) -> Detokenizer:
        """Of what follows: it goes on within the same text, so it has the blank before a word, and
        the rest of a character of which token ids hold the begin."""
        return text.detokenizer(self.token_ids, is_whole=self.written is not None)

    def shown(self, text: Text) -> str:
        """Without what `detokenizer` will finish."""
        if self.written is not None:
            return self.written
        shown = text.decode(self.token_ids)
        return shown[: len(shown) - num_unfinished(shown)]


def routes(front: Front, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class())

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        serving = front.generating(body)
        grammar = await grammar_for(front.grammars, body)
        prompts = await _prompts(serving, body)
        if len(prompts) * body.num_choices > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {body.num_choices} choices each are more than "
                f"{MAX_PROMPTS} sequences. Ask for fewer.",
                param="n",
            )
        starts = [
            start
            for prompt in prompts
            for start in (_scored if body.max_tokens == 0 else _continued)(
                serving, body, prompt, grammar
            )
        ]
        template = Completion(
            id=new_id("cmpl"), created=int(time.time()), model=serving.model_name, choices=[]
        )
        sequences = await submit_all(
            serving, body, front.options(body, request), template.id, starts
        )
        choices = [
            _Choice(serving.text, body, index, prompts[index // body.num_choices])
            for index in range(len(sequences))
        ]
        if body.stream:
            return EventStream(_events(template, body, sequences, choices, prompts), sequences)
        answers = await collect(request, sequences)

        def reply() -> Completion:
            pieces = [one.piece(answer) for one, answer in zip(choices, answers, strict=True)]
            usage = _usage(prompts, choices, sequences)
            return template.model_copy(update={"choices": pieces, "usage": usage})

        return await response(reply, num_entries(answers))

    return router


def _continued(
    serving: Serving, body: CompletionRequest, prompt: _Prompt, grammar: GrammarSpec | None
) -> list[Start]:
    """Choices that go on behind a prompt."""
    return [
        Start(prompt.token_ids, sampling, prompt.detokenizer(serving.text))
        for sampling in sampling_for(
            body,
            len(prompt.token_ids),
            max_tokens=body.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            grammar=grammar,
            prompt_logprobs=_num_prompt_logprobs(body),
            facts=serving.generator.facts,
            stop_token_ids=end_tokens(body, serving.text),
            defaults=serving.sampling_defaults,
            param="prompt",
        )
    ]


def _scored(
    serving: Serving, body: CompletionRequest, prompt: _Prompt, _: GrammarSpec | None
) -> list[Start]:
    """For a prompt behind which nothing is wanted: an instance generates one token at least, so it
    is made to generate the prompt's last. Then a prompt may be as long as the context, and that
    token's log probability is, as all are, the model's own."""
    ids, count = prompt.token_ids, _num_prompt_logprobs(body)
    check_fits(len(ids), serving.generator.facts, "prompt")
    sampling = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        allowed_token_ids=(ids[-1],),
        ignore_eos=True,
        logprobs=count,
        prompt_logprobs=count,
    )
    # There is something to compute in any case.
    computed = ids[:-1] or ids
    return [Start(computed, sampling, serving.text.detokenizer()) for _ in range(body.num_choices)]


def _num_prompt_logprobs(body: CompletionRequest) -> int | None:
    """What is to be found out of the prompt's tokens: what is asked for, and what an echo shows."""
    if body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


async def _prompts(serving: Serving, body: CompletionRequest) -> list[_Prompt]:
    facts = serving.generator.facts
    if not body.prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    prompts: list[_Prompt] = []
    for part in texts_or_ids(body.prompt):
        if isinstance(part, str):
            ids = await serving.text.encode(
                part,
                context_tokens=facts.max_model_len,
                add_special_tokens=body.add_special_tokens is not False,
            )
            prompts.append(_Prompt(part, ids))
        else:
            prompts.append(_Prompt(None, part))
    for one in prompts:
        check_token_ids(one.token_ids, facts)
    return prompts


class _Choice:
    """One choice as the API shows it: the text, behind the prompt if that is to be echoed."""

    def __init__(self, text: Text, body: CompletionRequest, index: int, prompt: _Prompt) -> None:
        self._text = text
        self._body = body
        self._index = index
        self._prompt = prompt
        whole = text.detokenizer() if body.echo else prompt.detokenizer(text)
        self._offsets = TextOffsets(text, whole)
        self._begun = False
        self.num_tokens = 0

    def piece(self, delta: Delta | Answer) -> CompletionChoice:
        """What comes next; the first piece has what is said of the prompt."""
        body = self._body
        choice = CompletionChoice(
            index=self._index, text=delta.text, finish_reason=delta.finish_reason
        )
        ids, logprobs = list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs)
        of_prompt = delta.prompt_logprobs
        if body.max_tokens == 0:  # what was generated is the prompt's last token, if not its only
            if len(self._prompt.token_ids) > 1:
                of_prompt = (*of_prompt, *delta.logprobs)
            choice.text, ids, logprobs = "", [], []
            choice.finish_reason = "length" if delta.finish_reason else None
        self.num_tokens += len(ids)
        if body.return_token_ids:
            choice.token_ids = ids
        shown = ids[: len(logprobs)]
        offsets: list[int] = []
        if not self._begun:
            self._begun = True
            offsets = self._say_prompt(choice, of_prompt)
            if body.echo:
                shown = [*self._prompt.token_ids, *shown]
                logprobs = [None, *of_prompt, *logprobs]
        if body.logprobs is not None:
            offsets += [self._offsets.of(token) for token in shown[len(offsets) :]]
            choice.logprobs = completion_logprobs(
                shown, logprobs, body.logprobs, self._text, offsets
            )
        return choice

    def _say_prompt(
        self, choice: CompletionChoice, of_prompt: Sequence[TokenLogprobs]
    ) -> list[int]:
        """Adds what is said of the prompt. Returns where its tokens begin, if they are shown."""
        body, prompt, offsets = self._body, self._prompt, []
        if body.return_token_ids:
            choice.prompt_token_ids = list(prompt.token_ids)
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(
                prompt.token_ids, of_prompt, self._text.tokens, body.prompt_logprobs
            )
        if body.echo:
            shown = prompt.shown(self._text)
            choice.text = shown + choice.text
            if body.logprobs is not None:
                offsets = [self._offsets.of(token, shown) for token in prompt.token_ids]
                self._offsets.begin_answer(len(shown))
        return offsets


def _usage(
    prompts: Sequence[_Prompt], choices: Sequence[_Choice], sequences: Sequence[TextSequence]
) -> Usage:
    """A prompt counts once, however many choices it has."""
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_cached = sum(one.num_cached for one in sequences[:: len(choices) // len(prompts)])
    return Usage.of(num_prompt, sum(choice.num_tokens for choice in choices), num_cached)


async def _events(
    template: Completion,
    body: CompletionRequest,
    sequences: Sequence[TextSequence],
    choices: Sequence[_Choice],
    prompts: Sequence[_Prompt],
) -> AsyncGenerator[Reply | bytes, None]:
    async with aclosing(merged(sequences)) as deltas:
        async for index, delta in deltas:
            size = num_entries([delta])
            piece = await aside(partial(choices[index].piece, delta), size)
            tells = piece.text or piece.finish_reason or piece.token_ids is not None
            if tells or (piece.logprobs is not None and piece.logprobs.tokens):
                yield await event(template.model_copy(update={"choices": [piece]}), size)
    if body.include_usage:
        yield template.model_copy(update={"usage": _usage(prompts, choices, sequences)})
