r"""How text is cut into words before its bytes are merged, by the names of `tokenizer.ggml.pre`.

Owns the table of these names: all that llama.cpp knew in October 2026. Invariant: a name that is
not in it is refused, since text that is cut otherwise than in training becomes other tokens, and
nothing shows it. Pure; knows neither files nor vocabularies.

The expressions are those of the models' own tokenizer.json where llama.cpp's are made to stand for
them in a library without Unicode's classes: it takes `\p{Lu}` for any letter, say, and composes no
characters (docs/adr/0037). The differential test holds a list of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from server.errors import ServerError


class UnknownSplit(ServerError):
    """The file names a way of cutting text that nobody here knows."""

    code = "unknown_split"


@dataclass(frozen=True)
class Split:
    """Each of `patterns` cuts what those before it left: its matches, and what lies between."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    """Whether a word that is a token is taken as it is."""
    adds_bos: bool = False
    """Whether a prompt starts with BOS where the file does not say it."""
    composes: bool = False
    """Whether characters are composed first (NFC)."""
    in_bytes: bool = True
    """Whether the vocabulary spells bytes, by GPT-2's letters for them; else characters."""
    marks_blanks: bool = False
    """Whether blanks are U+2581 in the vocabulary."""
    drops_blanks: bool = False


_ENDINGS: Final = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BLANKS: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3: Final = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}{_SIGNS}{_BLANKS}"
_QWEN2: Final = rf"{_ENDINGS}|{_WORD}|\p{{N}}{_SIGNS}{_BLANKS}"
_UPPER: Final = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER: Final = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(upper: str, lower: str, ending: str) -> str:
    """Words that change from upper to lower case at most once, as of o200k."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+{ending}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*{ending}"
    )


_CASED: Final = _cased(_UPPER, _LOWER, f"{_ENDINGS}?")
_CASED_SIGNS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_O200K: Final = rf"{_CASED}|\p{{N}}{{1,3}}{_CASED_SIGNS}{_BLANKS}"
_PUNCTUATION: Final = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK_WORDS: Final = (
    rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+"
)
_CJK: Final = "[\u4e00-\u9fa5\u3040-\u30ff]+"
_DEEPSEEK_CJK: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED_LETTERS: Final = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_BLOOM: Final = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_ENDLESS_BLANKS: Final = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_LINES: Final = r"[^\n]+|[\n]+"

_DIGITS_THEN_GPT2: Final = Split((r"\p{N}", _GPT2))
_OF_GPT2: Final = Split((_GPT2,))
_OF_LLAMA3: Final = Split((_LLAMA3,), ignores_merges=True, adds_bos=True)
_OF_QWEN2: Final = Split((_QWEN2,), composes=True)
_OF_O200K: Final = Split((_O200K,))
_OF_BLOOM: Final = Split((_BLOOM,))
_OF_DEEPSEEK3: Final = Split((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK_WORDS}[\r\n]*{_BLANKS}"))
_OF_COHERE2: Final = Split((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K), composes=True)
_OF_GEMMA4: Final = Split((_LINES,), adds_bos=True, in_bytes=False, marks_blanks=True)

DEFAULT: Final = "default"
"""What llama.cpp falls back to; it is no model's own."""

SPLITS: Final[Mapping[str, Split]] = {
    DEFAULT: Split(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1"), _OF_LLAMA3),
    **dict.fromkeys(("pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), _OF_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Split((_LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), Split((_LLAMA3,), ignores_merges=True)),
    "jais-2": Split(
        (
            rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}{_SIGNS}|\s*[\r\n]+"
            rf"{_ENDLESS_BLANKS}|\s{{1,2}}(?!\S)|\s{{1}}",
        )
    ),
    "minicpm5": Split(
        (r"\p{N}{1,3}", rf"{_ENDINGS}|{_WORD}|\p{{N}}+{_SIGNS}{_BLANKS}"), ignores_merges=True
    ),
    "deepseek-llm": Split(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _OF_DEEPSEEK3),
    "spark2_5": Split((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK_WORDS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "youtu": Split(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b"
            "\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u30ff]+",
            rf"{_CASED}|\p{{N}}{_CASED_SIGNS}{_BLANKS}",
        ),
        ignores_merges=True,
    ),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _DIGITS_THEN_GPT2,
    ),
    "command-r": replace(_DIGITS_THEN_GPT2, composes=True),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), _OF_GPT2),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), _OF_GPT2),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "roberta-bpe"), _OF_GPT2),
    **dict.fromkeys(("jais", "trillion", "granite-docling"), _OF_GPT2),
    **dict.fromkeys(("mpt", "olmo", "modern-bert"), replace(_OF_GPT2, composes=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _OF_QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan"), _OF_QWEN2),
    **dict.fromkeys(("solar-open", "grok-2"), Split((_QWEN2,))),
    "qwen35": Split(
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_BLANKS}",
        ),
        composes=True,
    ),
    "ufakzeka": Split((rf"{_WORD}|\p{{N}}{_SIGNS}{_BLANKS}",)),
    "seed-coder": Split((rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_BLANKS}",)),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        Split(
            (
                rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}{_SIGNS}"
                r"|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    "exaone-moe": Split(
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "laguna": Split((_LINES, _QWEN2)),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _OF_BLOOM),
    "viking": Split((_BLOOM, r"\p{N}")),
    "tekken": Split(
        (rf"{_cased(_UPPER, _LOWER, '')}|\p{{N}}{_CASED_SIGNS}{_BLANKS}",),
        ignores_merges=True,
        adds_bos=True,
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _OF_O200K),
    "granite-embed-multi-97m": replace(_OF_O200K, ignores_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _OF_COHERE2),
    "kimi-k2": Split(
        (
            r"[\p{Han}]+|"
            + _cased(rf"{_UPPER}&&[^\p{{Han}}]", rf"{_LOWER}&&[^\p{{Han}}]", f"{_ENDINGS}?")
            + rf"|\p{{N}}{{1,3}}{_SIGNS}{_BLANKS}",
        )
    ),
    "superbpe": Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "afmoe": Split(
        (
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff"
            "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            rf"{_DEEPSEEK_WORDS}[\r\n]*{_BLANKS}",
        )
    ),
    "chameleon": Split(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _OF_GEMMA4),
    "sarvam-moe": replace(_OF_GEMMA4, adds_bos=False),
    "whitespace": Split((r"\S+",), in_bytes=False, drops_blanks=True),
}
"""By name."""


def split_named(name: str) -> Split:
    """Raises UnknownSplit."""
    try:
        return SPLITS[name]
    except KeyError:
        raise UnknownSplit(
            f"it says that its text is cut into words as {name[:80]!r} does it "
            "(tokenizer.ggml.pre), which is not known here; --pre-tokenizer NAME would have it cut "
            "as a known one"
        ) from None
