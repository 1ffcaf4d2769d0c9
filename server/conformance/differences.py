"""What of two sides' answers is the same.

Owns the judgement on ids and on prompts; that on greedy tokens comes from the workers. Pure.
Invariant: what can't be judged is no agreement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel

from workers.messages import GreedyComparison

PartName = Literal["tokens", "chats", "greedy"]
_NOTATIONS: Final = ("'type': 'text'", '"type": "text"', '\\"city')
"""Of parts in Python's and JSON's notation, and of arguments that are a text within one."""
NOTHING: Final = "refused"
"""In place of a prompt, where the template refuses the chat."""


class Difference(BaseModel, frozen=True):
    """One sample, of which both sides make something else from the place `at` on."""

    sample: str
    ours: list[int] | str
    theirs: list[int] | str
    at: int


class Part(BaseModel, frozen=True):
    """One kind of samples."""

    name: PartName
    reference: str = ""
    """What it was compared with, and its version."""
    num_compared: int = 0
    num_same: int = 0
    num_near: int = 0
    """Not the same, for a reason that is known and no fault; `note` says which."""
    note: str = ""
    skipped: str = ""
    """Why there is nothing to compare, if so."""
    failed: str = ""
    """Why it could not be compared, if so."""
    differences: list[Difference] = []

    @property
    def holds(self) -> bool:
        return not self.failed and not self.differences


def compared_ids(
    texts: Sequence[str],
    ours: Sequence[list[int]],
    theirs: Sequence[list[int]],
    composed: Mapping[str, tuple[list[int], list[int]]],
) -> tuple[int, list[Difference]]:
    """How many are near, and those that differ. `composed`: of a text that is not composed (NFC),
    our ids and theirs of the one that is. Where ours are the same for both, and theirs those for
    the latter, the reference only composes no characters."""
    near, found = 0, []
    for text, one, other in zip(texts, ours, theirs, strict=True):
        if one == other:
            continue
        if text in composed and one == composed[text][0] == composed[text][1]:
            near += 1
        else:
            found.append(Difference(sample=text, ours=one, theirs=other, at=_parting(one, other)))
    return near, found


@dataclass(frozen=True)
class ExpectedPrompt:
    """Of one chat; None: the template refuses it."""

    prompt: str | None
    needed: tuple[str, ...]
    """What is lost where it is not in the prompt."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the chat was lost on the way, or garbled."""
        return self.prompt is not None and _is_whole(self.prompt, self.needed)

    def agrees(self, ours: str | None) -> bool:
        """What the reference loses may be refused, or kept."""
        if ours == self.prompt:
            return True
        return not self.is_whole and (ours is None or _is_whole(ours, self.needed))


def _is_whole(prompt: str, needed: Sequence[str]) -> bool:
    garbled = any(notation in prompt for notation in _NOTATIONS)
    return not garbled and all(text in prompt for text in needed)


def expected_prompt(forms: Sequence[Mapping[str, str]], needed: Sequence[str]) -> ExpectedPrompt:
    """Of what a template made of one chat in several forms (strings or parts, arguments as objects
    or as text) the first in which nothing is lost, else the first at all."""
    prompts = [form["text"] for form in forms if "text" in form]
    whole = (prompt for prompt in prompts if _is_whole(prompt, needed))
    return ExpectedPrompt(next(whole, prompts[0] if prompts else None), tuple(needed))


def compared_prompts(
    names: Sequence[str], ours: Sequence[str | None], theirs: Sequence[ExpectedPrompt]
) -> list[Difference]:
    """Those that differ; None is a chat that is refused."""
    return [
        Difference(
            sample=name,
            ours=one or NOTHING,
            theirs=other.prompt or NOTHING,
            at=_parting(one, other.prompt),
        )
        for name, one, other in zip(names, ours, theirs, strict=True)
        if not other.agrees(one)
    ]


def greedy_part(prompts: Sequence[str], answer: GreedyComparison) -> Part:
    """As the workers judged each token."""
    verdicts = [verdict for one in answer.prompts for verdict in one.verdicts]
    found = []
    for prompt, one in zip(prompts, answer.prompts, strict=True):
        if "differs" in one.verdicts:
            found.append(
                Difference(
                    sample=prompt,
                    ours=list(one.token_ids),
                    theirs=list(one.reference_ids),
                    at=one.verdicts.index("differs"),
                )
            )
    return Part(
        name="greedy",
        reference=answer.reference,
        num_compared=len(verdicts),
        num_same=verdicts.count("same"),
        num_near=verdicts.count("tie"),
        note=f"ours in {answer.dtype} by {answer.computed_by}"
        + "; what is near is a tie" * ("tie" in verdicts),
        differences=found,
    )


def _parting(one: Any, other: Any) -> int:
    """The first place at which they are not the same."""
    pairs = zip(one or "", other or "", strict=False)
    return next(
        (at for at, (a, b) in enumerate(pairs) if a != b), min(len(one or ""), len(other or ""))
    )
