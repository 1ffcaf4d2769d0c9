"""Which tokens end an answer, as a model's files say it: one id, or several, or nothing. Pure."""

from workers.errors import CheckpointCorrupt


def end_tokens(said: object, where: str) -> tuple[int, ...] | None:
    """The ids of an `eos_token_id`; None where it says nothing. `where` is told to a person. Raises
    CheckpointCorrupt."""
    ids = said if isinstance(said, list | tuple) else [said]
    ids = [one for one in ids if one is not None]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < 1 << 31:
            raise CheckpointCorrupt(
                f"{where} says that eos_token_id is {str(said)[:80]!r}, which is no token's id: "
                "correct it, or download it again"
            )
    return tuple(dict.fromkeys(ids)) or None
