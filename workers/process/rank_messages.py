"""What the first rank of an instance says to the others, and they to it.

Owns the wire types, one union per direction, and how a batch is written down. Invariant: a message
is bounded and validated when it is decoded; what it tells of memory is a handle or a place, never
an address. Does not know how it travels.

    Begin ─► Mapped, then Prepared    what to map and to build; Failed in place of either
    Compute                           how all of them compute
    Step ─► nothing, or Undone        one pass: the sums tell who has come how far
    Rest                              nobody computes for now
"""

from typing import Annotated, Final, Literal

import msgspec

from allocator.messages import Extent, Handle, Sealed
from workers.messages import Bounded, Count, Message

MAX_FRAME_BYTES: Final = 64 << 20
"""A million tokens of a step are 4 MiB, and the blocks of as many sequences some more."""
COMMON: Final = 0
"""The memory that ranks have in common by their fork, among the places of blocks. Pools are
1, 2, … in the order in which they were told of."""
Text = Annotated[str, msgspec.Meta(max_length=65536)]


# --- first rank → another


class Begin(Message, tag="begin", frozen=True):
    """Map the group's memory, an extent of the first pool, and join; map the weights; build the
    model. Nobody is waited for longer than `timeout_s`."""

    pool: Handle
    group: Extent
    weights: Sealed
    divides: Literal["model", "sequences"]
    """Each rank has its part of the model for all sequences, or the model for some of them."""
    max_rows: Annotated[int, msgspec.Meta(ge=1)]
    max_model_len: Annotated[int, msgspec.Meta(ge=1)]
    num_threads: Annotated[int, msgspec.Meta(ge=1)]
    """Of a pass at most."""
    module_threads: Annotated[int, msgspec.Meta(ge=1)]
    """Of transformers' modules."""
    kernels: Bounded
    attention_workspace: Count
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0)]


class Compute(Message, tag="compute", frozen=True):
    """All ranks are there. `natively` only where each of them can."""

    natively: bool


class PartOfStep(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The next tokens of one sequence. Its table holds `num_tokens`, and has these `blocks` from
    the one with the number `first_block` on; those before are known."""

    table: Count
    num_tokens: Count
    first_block: Count
    blocks: bytes
    """int64 # [num_blocks, 3]: where it is (`COMMON` or a pool), its offset there, whether it is
    written to."""
    token_ids: bytes
    """int32 # [num_new]"""
    num_logits: Count


class Step(Message, tag="step", frozen=True):
    """Compute these parts, in this order. Before that: `tables` that are gone, further pools."""

    gone: tuple[Count, ...]
    pools: tuple[Handle, ...]
    parts: tuple[PartOfStep, ...]
    num_threads: Annotated[int, msgspec.Meta(ge=1)]


class Rest(Message, tag="rest", frozen=True):
    """No step follows for now. `gone` as in `Step`."""

    gone: tuple[Count, ...]


ToRank = Begin | Compute | Step | Rest


# --- another rank → the first


class Mapped(Message, tag="mapped", frozen=True):
    """It is about to join the group."""


class Prepared(Message, tag="prepared", frozen=True):
    """Its part of the model is there. `kernels` compute it, "" where none can, and why."""

    kernels: Bounded
    reason: Text


class Failed(Message, tag="failed", frozen=True):
    """It can't have its part of this model, and ends."""

    code: Bounded
    message: Text


class Undone(Message, tag="undone", frozen=True):
    """An error of a pass here, of which nothing is kept. Where it was one of all ranks it is the
    matter of what was computed; else they don't agree any more."""

    message: Text


FromRank = Mapped | Prepared | Failed | Undone

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_to_rank(frame: bytes) -> ToRank:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _to_rank.decode(frame)


def decode_from_rank(frame: bytes) -> FromRank:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    return _from_rank.decode(frame)
