"""What can go wrong in this room, by name. `code` travels to the server, the message to a person.

Invariant: a message names what to change.
"""

from pathlib import Path
from typing import ClassVar, Final

_MAX_LENGTH: Final = 4096
"""Of an error on the wire."""


class WorkerError(Exception):
    """Base of all errors of this room."""

    code: ClassVar[str] = "worker_error"


class CheckpointError(WorkerError):
    """Base: the model can't be read."""

    code = "checkpoint"


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint at this path."""

    code = "checkpoint_not_found"


class CheckpointCorrupt(CheckpointError):
    """A file is damaged, truncated, or not what its name says."""

    code = "checkpoint_corrupt"


class CheckpointMismatch(CheckpointError):
    """The tensors do not fit the architecture that the config names."""

    code = "checkpoint_mismatch"


class CheckpointChanged(CheckpointError):
    """The files are no longer those of the weights that are served, and these are gone."""

    code = "checkpoint_changed"


class UnsupportedCheckpoint(CheckpointError):
    """A sound checkpoint in a format or an architecture that can't be served."""

    code = "unsupported_checkpoint"


class CacheNotWritable(WorkerError):
    """A file that is made once can't be written where such files are."""

    code = "cache_not_writable"


class InvalidSetting(WorkerError):
    """The instance was told something that this model can't do."""

    code = "invalid_setting"


class InstanceLost(BaseException):
    """Base: nothing can be computed any more, so that the instance must end and its requests go on
    in another. No `Exception`, since whoever keeps an error over one request from ending the
    instance must let this one pass."""


class DeviceLost(InstanceLost):
    """Every call of this process to its device fails from now on."""


class RanksLost(InstanceLost):
    """The ranks of this instance can't go on together: one has ended, hangs or met an error that
    the others did not."""

    def __init__(self, message: str, rank: int | None) -> None:
        """`rank` is the one to blame, where that is known."""
        super().__init__(message)
        self.rank: Final = rank


class ReadFailed(WorkerError):
    """Bytes of a file could not be brought into memory."""

    code = "read_failed"

    def __init__(self, message: str, errno: int, path: Path, begin: int) -> None:
        """`errno` is 0 where the file ends before the byte `begin`."""
        super().__init__(message)
        self.errno: Final = errno
        self.path: Final = path
        self.begin: Final = begin


class ReadCancelled(WorkerError):
    """Somebody gave up the bytes that were waited for."""

    code = "read_cancelled"


class ReadTimedOut(WorkerError):
    """Bytes of a file are not in memory yet."""

    code = "read_timed_out"


class ReaderClosed(WorkerError):
    """Whoever read files has been closed, or is another process's."""

    code = "reader_closed"


class RankError(WorkerError):
    """Base: ranks that compute together can't go on."""

    code = "rank"

    def __init__(self, message: str, rank: int | None = None) -> None:
        """`rank` is the one that it is about."""
        super().__init__(message)
        self.rank: Final = rank


class RankEnded(RankError):
    """The process of a rank has ended."""

    code = "rank_ended"


class RankTimedOut(RankError):
    """A rank did not come within its deadline: it hangs, is stopped, or was never started."""

    code = "rank_timed_out"


class RankLeft(RankError):
    """A rank has left while others go on."""

    code = "rank_left"


class GroupBroken(RankError):
    """Another rank met an error, so that none of them can go on."""

    code = "group_broken"


class GroupInUse(RankError):
    """The place or the memory is another's."""

    code = "group_in_use"


class PartFailed(WorkerError):
    """Another rank could not compute its part of a pass."""

    code = "part_failed"


class SeriesTimedOut(WorkerError):
    """Another rank did not do its part of a pass within the deadline, or has left the group."""

    code = "series_timed_out"


class SeriesOutOfOrder(WorkerError):
    """The linears of a sharded series are used in another order than that of their layers."""

    code = "series_out_of_order"


class SeriesClosed(WorkerError):
    """The linears of a sharded series are not to be had any more."""

    code = "series_closed"


class OutOfKVMemory(WorkerError):
    """The machine can't give the memory for one more sequence."""

    code = "out_of_kv_memory"


class InvalidLogits(WorkerError):
    """The model gave no usable distribution: NaN, or nothing finite."""

    code = "invalid_logits"


class NoTokenLeft(InvalidLogits):
    """What the request demands forbids every token that could come next."""

    code = "no_token_left"


class UnknownVocabulary(WorkerError):
    """What the model's tokens stand for can't be found out."""

    code = "unknown_vocabulary"


class GrammarFailed(WorkerError):
    """A grammar can't be compiled, or could not be followed within its limits."""

    code = "grammar_failed"


class InvalidEmbedding(WorkerError):
    """The model gave no usable vector: NaN, or something infinite."""

    code = "invalid_embedding"


def for_the_wire(message: str) -> str:
    """As much of it as a message may hold. It may quote a request, with half a surrogate pair in
    it, which is no text."""
    return message.encode(errors="replace").decode()[:_MAX_LENGTH]


def unexpected(error: Exception) -> str:
    """What a client is told of an error of ours; the log has all of it."""
    return f"an error of the instance ended this request ({type(error).__name__}); its log has more"
