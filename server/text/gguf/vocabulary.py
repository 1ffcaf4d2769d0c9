"""A GGUF file's tokens: their texts, kinds, scores and merges, checked against one another.

Owns the step from metadata to a vocabulary. Invariant: one that was made has a text of its own for
each id, so that no two tokens are taken for one another. Pure; does not know how text is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from server.errors import ServerError

NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6
WHOLE: Final = frozenset({UNKNOWN, CONTROL, USER_DEFINED})
"""Found in a text before it is cut into words."""

_KEY: Final = "tokenizer.ggml."


class BadVocabulary(ServerError):
    """The file's tokens contradict one another, or say what nobody can use."""

    code = "bad_vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """By id: `tokens` their texts, `kinds` as GGUF numbers them, `scores` (empty if not given)."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    """Two tokens with a blank between them, what is merged first at the front."""
    said: Mapping[str, Any]
    """All that the file says under `tokenizer.ggml.`, without that."""
    ids: Mapping[str, int]

    def token_id(self, role: str) -> int | None:
        """As `{role}_token_id` says it; None where it does not, or where there is no such token."""
        said = self.said.get(f"{role}_token_id")
        if said is None:
            return None
        if not isinstance(said, int) or isinstance(said, bool):
            raise BadVocabulary(f"its {_KEY}{role}_token_id is {str(said)[:40]!r}: no token's id")
        return said if 0 <= said < len(self.tokens) else None

    def flag(self, name: str) -> bool | None:
        """None where the file does not say it."""
        said = self.said.get(name)
        if said is None or isinstance(said, bool):
            return said
        raise BadVocabulary(f"its {_KEY}{name} is {str(said)[:40]!r} and not true or false")

    def of_kind(self, *kinds: int) -> list[int]:
        """Ids, ascending."""
        wanted = set(kinds)
        return [token_id for token_id, kind in enumerate(self.kinds) if kind in wanted]


def vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Of what `read_metadata` gave. Raises BadVocabulary."""
    said = {name.removeprefix(_KEY): v for name, v in metadata.items() if name.startswith(_KEY)}
    raw = said.pop("tokens", None)
    if not is_list(raw, bytes) or not raw:
        raise BadVocabulary(f"it has no tokens ({_KEY}tokens)")
    tokens = _texts(raw, "token")
    if not all(tokens):
        tokens = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(tokens)]
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise BadVocabulary(f"two of its tokens are {twice[:80]!r}, so ids would be mistaken")
    kinds = said.pop("token_type", None) or [NORMAL] * len(tokens)
    scores = said.pop("scores", None) or []
    for name, values, kind in (("token_type", kinds, int), ("scores", scores, int | float)):
        if not is_list(values, kind) or (values and len(values) < len(tokens)):
            raise BadVocabulary(f"its {_KEY}{name} does not hold a number for each token")
    merges = said.pop("merges", None) or []
    if not is_list(merges, bytes):
        raise BadVocabulary(f"its {_KEY}merges is no list of texts")
    return Vocabulary(
        tokens=tokens,
        kinds=kinds[: len(tokens)],
        scores=scores[: len(tokens)],
        merges=_texts(merges, "merge"),
        said=said,
        ids=ids,
    )


def is_list(value: Any, kind: Any) -> bool:
    """Of that kind, as a header's lists are of one kind."""
    return isinstance(value, list) and (not value or isinstance(value[0], kind))


def _texts(raw: Sequence[bytes], what: str) -> list[str]:
    try:
        return [one.decode() for one in raw]
    except UnicodeDecodeError:
        for number, one in enumerate(raw):
            try:
                one.decode()
            except UnicodeDecodeError as error:
                raise BadVocabulary(f"its {what} {number} is no UTF-8: {one[:40]!r}") from error
        raise
