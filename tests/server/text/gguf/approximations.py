r"""Where llama.cpp cuts otherwise than the models' own tokenizer.json, on purpose or by its limits.

Owns these rules, as llama.cpp has them, by the names of `tokenizer.ggml.pre`. They show that ours
differs from llama.cpp there in nothing else: with them in place of ours, the ids are the same.

- It composes no characters, where Qwen's, Cohere's and NeoX's tokenizers do (NFC).
- Its library knows `\p{L}`, but neither upper and lower case beyond ASCII nor, in the rules of
  o200k, marks as parts of words: words of Hindi or Thai fall apart.
- A class of characters that is written down, as DeepSeek has them, matches no blank beyond ASCII.
- Digits by threes from the end (`\b`, lookahead) are code of its own: what stands before them is
  glued to the first.
- `\d` is ASCII's, Han is a list of blocks.
"""

from dataclasses import replace
from typing import Final

from server.text.gguf.splits import SPLITS, Split

_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GLUED = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ebef"
    "\uf900-\ufaff\U0002f800-\U0002fa1f"
)


def _cased(letters: str, ending: str) -> str:
    upper, lower = rf"(?:(?=[{letters}])[^a-z])", rf"(?:(?=[{letters}])[^A-Z])"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"
    )


def _uncased(digits: str) -> str:
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_ENDINGS}?"
    return rf"{word}|{digits}{_REST}"


def _no_blanks(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Without U+3000, and U+2000 to U+200A and the like, in what is written as a range."""
    return tuple(
        one.replace("\u3000-\u3002", "\u3001\u3002").replace(
            "\uac00-\ud7ff]", "\uac00-\ud7ff&&\\S]"
        )
        for one in patterns
    )


def _like(name: str, *patterns: str) -> Split:
    return replace(SPLITS[name], patterns=patterns, composes=False)


_O200K = _cased(r"\p{L}", f"{_ENDINGS}?") + r"|\p{N}{1,3}" + _REST
_COHERE2 = (_GLUED, _uncased(r"\p{N}{1,3}"))

AS_LLAMACPP: Final = {
    **{name: _like(name, *split.patterns) for name, split in SPLITS.items() if split.composes},
    **{
        name: _like(name, _O200K)
        for name in ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")
    },
    "granite-embed-multi-97m": _like(
        "granite-embed-multi-97m",
        _cased(r"\p{L}\p{M}", f"{_ENDINGS}?") + r"|\p{N}{1,3}" + _REST,
    ),
    "tekken": _like("tekken", _cased(r"\p{L}", "") + r"|\p{N}" + _REST),
    "youtu": _like("youtu", SPLITS["youtu"].patterns[0], _uncased(r"\p{N}")),
    "tiny_aya": _like("tiny_aya", *_COHERE2),
    "cohere2moe": _like("cohere2moe", *_COHERE2),
    "afmoe": _like("afmoe", _GLUED, *SPLITS["afmoe"].patterns[1:]),
    "superbpe": _like("superbpe", r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"),
    "deepseek-llm": _like("deepseek-llm", *_no_blanks(SPLITS["deepseek-llm"].patterns)),
    "deepseek-coder": _like("deepseek-coder", *_no_blanks(SPLITS["deepseek-coder"].patterns)),
    "kimi-k2": _like(
        "kimi-k2",
        rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_ENDINGS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
