"""Which of a GGUF file's tokens end an answer, said by it or known by their names.

Owns the names, which are llama.cpp's. Invariant: a token that a chat template ends turns by is
among them though the file names only the end of a text (Llama 3's `<|eot_id|>`, Phi 3's `<|end|>`,
Gemma's `<end_of_turn>`). Pure.
"""

from collections.abc import Iterator
from typing import Final

from server.text.gguf.vocabulary import CONTROL, WHOLE, Vocabulary

_ROLES: Final = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ENDS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    }
)
_ENDS_IF_CONTROL: Final = frozenset({"</s>"})
"""Of Qwen and Gemma it is HTML's end of what is struck through."""
_OTHER_FILES: Final = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Behind these comes another file's text: what answers a request is over."""
_NO_END_BESIDE: Final = (
    (
        "<|end|>",
        ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}, {"<|call|>", "<|flush|>"}),
    ),
    ("</s>", ({"<|tool_response>"}, {"<|plamo:eos|>"})),
)
"""What ends a message, and not the turn, where there are tokens that do."""


def end_names() -> frozenset[str]:
    """Of tokens that are whole wherever they stand, whatever kind the file gives them."""
    return _ENDS


def ending_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ascending."""
    found = set(_ending_ids(vocabulary))
    names = {vocabulary.tokens[token_id] for token_id in found}
    for name, beside in _NO_END_BESIDE:
        if any(others <= names for others in beside):
            found.discard(vocabulary.ids.get(name, -1))
    return tuple(sorted(found))


def _ending_ids(vocabulary: Vocabulary) -> Iterator[int]:
    for role in _ROLES:
        token_id = vocabulary.token_id(role)
        if token_id is not None:
            yield token_id
        elif role in _OTHER_FILES:
            ids = (vocabulary.ids.get(name) for name in _OTHER_FILES[role])
            yield from (one for one in ids if one is not None and vocabulary.kinds[one] in WHOLE)
    for name in _ENDS:
        if (token_id := vocabulary.ids.get(name)) is not None:
            yield token_id
    for name in _ENDS_IF_CONTROL:
        token_id = vocabulary.ids.get(name)
        if token_id is not None and vocabulary.kinds[token_id] == CONTROL:
            yield token_id
