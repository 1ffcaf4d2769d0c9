"""Text to token ids and back: the only place that has a tokenizer.

Owns the tokenizer and the way of a chat through the model's template. Invariant: what is done for a
prompt is bounded by the model's context, not by the prompt.

Built on `tokenizers` alone: for the same tokenizer.json, transformers' classes take ten times as
long to import and twice the memory (0.06 s and 54 MB against 0.55 s and 107 MB for SmolLM2). Knows
nothing of HTTP, instances, torch.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from tokenizers import Tokenizer

from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.chat_template import DEFAULT, Chat, ChatTemplate, TemplateFailed
from server.text.folder_tokens import named_tokens
from server.text.gguf.build import SPECIAL_IDS_FILE
from server.text.incremental import Detokenizer
from server.text.template_files import template_sources
from server.text.token_texts import TokenTexts
from server.text.tokenizer_files import TokenizerFilesError, TokenizerMissing
from server.text.tokenizer_limits import MAX_CHARS, normalizer_growth
from workers import MAX_TOKENIZER_BYTES, CheckpointError, end_tokens, read_file, read_json

INLINE_CHARS: Final = 8192
"""Up to that many are encoded where the event loop runs (some 3 ms); more in a thread."""

MAX_CHARS_PER_COMPOSED: Final = 4
"""A normalizer may make one character of several; Unicode composition of four at most."""


class NoChatTemplate(InvalidRequest):
    """The model can complete text, but nobody said how a chat is written for it."""

    code = "no_chat_template"


class BadChatTemplate(TokenizerFilesError):
    """What was given as one is none."""


class Text:
    """A model's tokenizer and chat template. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        stop_token_ids: Sequence[int] = (),
        lowers_inputs: bool = False,
        file: Path | None = None,
    ):
        """`stop_token_ids`: the tokens that end an answer, as the tokenizer's files say.
        `lowers_inputs`: whether a model that embeds was trained on lower-case text alone. `file`:
        the tokenizer.json that it was read from."""
        # A prompt is never cut or filled up in silence, whatever tokenizer.json was saved with.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lowers_inputs = lowers_inputs
        self._chat_template = chat_template
        self._render_thread = ThreadPoolExecutor(1, "chat-template")
        self.special_texts: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        """What a prompt calls the tokens that are no part of any text."""
        self.special_ids: Mapping[str, int] = {
            text: token_id for token_id, text in self.special_texts.items()
        }
        """The same, by their texts."""
        self.stop_token_ids = tuple(stop_token_ids)
        self.tokens = TokenTexts(tokenizer, file)
        """What each token shows, alone."""

    @classmethod
    def load(
        cls, folder: Path, chat_template: str | None = None, *, tokenizer_file: Path | None = None
    ) -> Self:
        """From a folder that `tokenizer_folder` gave; `chat_template` replaces the model's own,
        `tokenizer_file` is where its tokenizer.json is kept, if not there. Raises
        `TokenizerMissing` if the files can't be read."""
        file = tokenizer_file or folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_buffer(read_file(file, MAX_TOKENIZER_BYTES))
        except CheckpointError as error:
            raise TokenizerMissing(str(error)) from error
        except Exception as error:  # the library raises plain `Exception`
            raise TokenizerMissing(
                f"{folder / 'tokenizer.json'} can't be read: {error}. Copy it anew."
            ) from error
        config = _json_object(folder / "tokenizer_config.json")
        if chat_template is None:
            older = _json_object(folder / "chat_template.json")
            sources = template_sources(
                folder, config.get("chat_template") or older.get("chat_template")
            )
        else:
            sources = {DEFAULT: chat_template}
        names = named_tokens(folder, config, tokenizer)
        return cls(
            tokenizer,
            chat_template=ChatTemplate(sources, names) if sources else None,
            stop_token_ids=_stop_token_ids(folder, tokenizer, names),
            lowers_inputs=_lowers_inputs(folder),
            file=file,
        )

    def close(self) -> None:
        """Ends the template's process."""
        if self._chat_template is not None:
            self._chat_template.close()
        self._render_thread.shutdown(wait=False, cancel_futures=True)  # nothing to wait for now

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def check_chat_template(self) -> None:
        """Raises `BadChatTemplate` where it is no template, whatever it is asked for."""
        if self._chat_template is None:
            return
        try:
            self._chat_template.render(
                Chat([{"role": "user", "content": "x"}]), max_chars=MAX_CHARS
            )
        except TemplateFailed as error:
            if not error.is_its_answer:
                raise BadChatTemplate(f"The chat template can't be used: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's tokens; the model's may be larger (padded), not smaller."""
        return int(self._tokenizer.get_vocab_size())

    # --- text → ids

    async def encode(
        self, prompt: str, *, context_tokens: int, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of a prompt, with the special tokens (such as BOS) that the tokenizer puts around it,
        or without. The event loop goes on meanwhile if the prompt is long.

        A prompt so long that it can't fit `context_tokens` is refused before any work is done:
        raises `ContextLengthExceeded`. One that is returned may still be too long.
        """
        self._check_length(prompt, context_tokens)
        return await self._encode(prompt, add_special_tokens, "prompt")

    async def encode_inputs(
        self, inputs: Sequence[str], *, context_tokens: int, truncate_to: int | None = None
    ) -> list[list[int]]:
        """Ids of texts to embed, with the special tokens. With `truncate_to`, of a text that has
        more the first so many, special ones included, are kept; else raises as `encode` does.
        The event loop goes on meanwhile if there is much to do."""
        if truncate_to is None:
            for text in inputs:
                self._check_num_chars(len(text), context_tokens, "input")
        elif truncate_to <= self._num_special:
            raise InvalidRequest(
                f"'truncate_prompt_tokens' is {truncate_to}, which leaves no room for the text "
                f"beside {self._num_special} special tokens.",
                param="truncate_prompt_tokens",
            )
        else:
            most = min(self.max_chars(truncate_to), self._most_chars)
            inputs = [text[:most] for text in inputs]
        if sum(map(len, inputs)) <= INLINE_CHARS:
            return self._encode_inputs(inputs, truncate_to)
        return await asyncio.to_thread(self._encode_inputs, inputs, truncate_to)

    def _encode_inputs(self, inputs: Sequence[str], truncate_to: int | None) -> list[list[int]]:
        if self._lowers_inputs:
            inputs = [text.lower() for text in inputs]
        try:
            batch = self._tokenizer.encode_batch_fast(list(inputs), add_special_tokens=False)
        except TypeError as error:
            raise _half_a_pair("input") from error
        for encoding in batch:
            if truncate_to is not None:
                encoding.truncate(truncate_to - self._num_special)
        return [self._tokenizer.post_process(encoding).ids for encoding in batch]

    @cached_property
    def _num_special(self) -> int:
        """Tokens that are put around a text."""
        return int(self._tokenizer.num_special_tokens_to_add(False))

    async def encode_chat(
        self, chat: Chat, *, context_tokens: int, add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a chat as the model's template writes it.

        The template writes all special tokens itself, so none is added but where that is asked for.
        Chats are rendered one after the other in a thread of their own, so that a slow template
        delays chats and nothing else. Raises `NoChatTemplate`, `ContextLengthExceeded`, or
        `InvalidRequest` with what the template says.
        """
        render = self._chat_renderer(chat, context_tokens)
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._render_thread, self._checked, render, context_tokens
        )
        return await self._encode(prompt, add_special_tokens, "messages")

    def rendered(self, chat: Chat, *, context_tokens: int) -> str:
        """A chat as the model's template writes it. Blocks; raises as `encode_chat` does."""
        return self._checked(self._chat_renderer(chat, context_tokens), context_tokens)

    def _chat_renderer(self, chat: Chat, context_tokens: int) -> Callable[[], str]:
        template = self._chat_template
        if template is None:
            raise NoChatTemplate(
                "This model has no chat template. Use /v1/completions, or start the server with "
                "--chat-template FILE.",
                param="messages",
            )
        self._check_num_chars(chat.num_chars, context_tokens, "messages")
        max_chars = self.max_chars(context_tokens) + 1  # so that what is too long is seen as such
        return lambda: template.render(chat, max_chars=max_chars)

    def _checked(self, render: Callable[[], str], context_tokens: int) -> str:
        try:
            prompt = render()
        except TemplateFailed as error:
            told = str(error) if error.param else f"The chat template failed: {error}"
            raise InvalidRequest(told, param=error.param or "messages") from error
        self._check_num_chars(len(prompt), context_tokens, "messages")
        return prompt

    def _encoded(self, prompt: str, add_special_tokens: bool, param: str) -> list[int]:
        # `encode` computes offsets too, and holds the interpreter's lock while it works.
        try:
            batch = self._tokenizer.encode_batch_fast(
                [prompt], add_special_tokens=add_special_tokens
            )
        except TypeError as error:  # a string that isn't Unicode text is no string to it
            raise _half_a_pair(param) from error
        ids: list[int] = batch[0].ids
        return ids

    async def _encode(self, prompt: str, add_special_tokens: bool, param: str) -> list[int]:
        if len(prompt) <= INLINE_CHARS:
            return self._encoded(prompt, add_special_tokens, param)
        return await asyncio.to_thread(self._encoded, prompt, add_special_tokens, param)

    @cached_property
    def _most_chars(self) -> int:
        """Of a text that is encoded, whatever the context: a normalizer can make many of one."""
        return int(MAX_CHARS / normalizer_growth(self._tokenizer))

    @cached_property
    def _longest_token_chars(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def max_chars(self, context_tokens: int) -> int:
        """More characters than that are more than `context_tokens` tokens.

        A token stands for no more characters than its own text has (in a byte-level vocabulary a
        character per byte). Tokenizers that drop characters, such as runs of blanks, could make
        fewer tokens of a longer text; for them this is the limit that the server sets.
        """
        shrink = 1 if self._tokenizer.normalizer is None else MAX_CHARS_PER_COMPOSED
        return context_tokens * self._longest_token_chars * shrink

    def _check_length(self, prompt: str, context_tokens: int) -> None:
        self._check_num_chars(len(prompt), context_tokens, "prompt")

    def _check_num_chars(self, num_chars: int, context_tokens: int, param: str) -> None:
        noun = "input" if param == "input" else "prompt"
        if num_chars > context_tokens and num_chars > self.max_chars(context_tokens):
            least = num_chars * context_tokens // self.max_chars(context_tokens)
            raise ContextLengthExceeded(
                f"The {noun} has {num_chars} characters, which is at least {least} tokens; the "
                f"model's context holds {context_tokens}. Shorten the {noun}.",
                param=param,
            )
        if num_chars > self._most_chars:
            raise ContextLengthExceeded(
                f"The {noun} has {num_chars} characters; of more than {self._most_chars} the "
                f"model's normalizer could make too much to compute. Shorten the {noun}.",
                param=param,
            )

    # --- ids → text

    def decode(self, token_ids: Sequence[int]) -> str:
        """All at once, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self, before: Sequence[int] = (), *, is_whole: bool = True) -> Detokenizer:
        """A new one, for one sequence that goes on behind the text of `before`. `is_whole`: as
        `Detokenizer` has it."""
        return Detokenizer(self.decode, self.special_texts, before=before, is_whole=is_whole)


def _half_a_pair(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"The {'input' if param == 'input' else 'prompt'} holds half of a surrogate pair, which is "
        "no text.",
        param=param,
    )


# --- what is in the files


def _json_object(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises `TokenizerMissing` if it is no JSON object."""
    if not os.path.lexists(file):
        return {}
    try:
        return read_json(file)
    except CheckpointError as error:
        raise TokenizerMissing(str(error)) from error


def _lowers_inputs(folder: Path) -> bool:
    """As sentence-transformers says, where it saved the model."""
    files = folder.glob("sentence_*_config.json")
    return any(_json_object(file).get("do_lower_case") is True for file in files)


def _stop_token_ids(
    folder: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    """All that ends an answer: the tokenizer's EOS, and what the files add (end of turn, …)."""
    candidates = [tokenizer.token_to_id(special_tokens.get("eos_token", ""))]
    for file, key in (
        (folder / "generation_config.json", "eos_token_id"),
        (folder / SPECIAL_IDS_FILE, "end_token_ids"),
    ):
        try:
            candidates += end_tokens(_json_object(file).get(key), str(file)) or ()
        except CheckpointError as error:
            raise TokenizerMissing(str(error)) from error
    return tuple(sorted({value for value in candidates if isinstance(value, int)}))
