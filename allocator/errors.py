"""Everything the allocator and its client can say no with, by name.

Owns the one hierarchy of this room and the codes that carry it over the wire. Invariant: a code
names exactly one class, on both sides. A message says what happened and what would help.
"""

from typing import ClassVar


class AllocatorError(Exception):
    """Base of all errors of this room. `code` is what travels."""

    code: ClassVar[str] = "internal"


class AllocatorGone(AllocatorError):
    """No allocator answers: it never ran, or it ended. Mapped memory stays valid."""

    code = "allocator_gone"


class AllocatorSilent(AllocatorGone):
    """An allocator is there, and does not answer in time; or did not, and was not asked again."""

    code = "allocator_silent"


class Unanswered(AllocatorGone):
    """The allocator ended before it answered: nobody knows whether it did what was asked."""

    code = "unanswered"


class RuntimeDirError(AllocatorError):
    """The runtime directory can't hold the sockets: not ours, not writable, or too long a path."""

    code = "runtime_dir"


class AlreadyRunning(AllocatorError):
    """Another allocator owns this runtime directory."""

    code = "already_running"


class Unauthorized(AllocatorError):
    """The peer runs as another user, or sent a token that no lifeline stands behind."""

    code = "unauthorized"


class AllocatorBusy(AllocatorError):
    """The allocator takes no further client at the moment: too many are about to connect, or it has
    no descriptors left. Worth trying again."""

    code = "allocator_busy"


class InvalidMessage(AllocatorError):
    """A frame was malformed, too long, or not allowed in this state."""

    code = "invalid_message"


class OutOfDeviceMemory(AllocatorError):
    """The device can't hold what was asked for. The message says who holds it and what helps."""

    code = "out_of_device_memory"


class SharedMemoryFull(OutOfDeviceMemory):
    """The kernel has no memory for `num_bytes` of shared memory now: others use it, too."""

    code = "shared_memory_full"

    def __init__(self, message: str, num_bytes: int = 0) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


class RoomTaken(OutOfDeviceMemory):
    """There would be room, but other sessions hold it. They come and go: it is worth waiting."""

    code = "room_taken"


class FingerprintMismatch(AllocatorError):
    """The key names a weight set made from something else. The message lists what differs."""

    code = "fingerprint_mismatch"


class StaleGeneration(AllocatorError):
    """The handle belongs to a weight set that has since been freed or made anew."""

    code = "stale_generation"


class NotWriter(AllocatorError):
    """Only the session that was elected writer may reserve, fill and seal."""

    code = "not_writer"


class UnknownWeightSet(AllocatorError):
    """No weight set has this key, or the session does not hold it."""

    code = "unknown_weight_set"


class WeightSetBusy(AllocatorError):
    """The weight set can't be evicted while it is loading or has readers."""

    code = "weight_set_busy"


class DoubleFree(AllocatorError):
    """The extent is free already."""

    code = "double_free"


class ForeignExtent(AllocatorError):
    """No extent begins there, or another session holds it."""

    code = "foreign_extent"


class QuotaExceeded(AllocatorError):
    """A model or a user may not hold so much. The message says what it holds."""

    code = "quota_exceeded"


class InvalidSetting(AllocatorError):
    """An option that no daemon can be started with: an unknown device, page policy or quota."""

    code = "invalid_setting"


class WaitTimeout(AllocatorError):
    """A bounded wait ran out: for a reply, or for another process to finish loading."""

    code = "wait_timeout"


class DiskFull(AllocatorError):
    """A folder can't hold what was to be written there. The message says how much that is."""

    code = "disk_full"


class DiskError(AllocatorError):
    """A file can't be written or read, for another reason than room."""

    code = "disk_error"


class ImageCorrupt(AllocatorError):
    """The file is no whole image of a weight set, or not ours. It can be deleted."""

    code = "image_corrupt"


class JournalError(AllocatorError):
    """The journal did not take a record, or could not be written anew."""

    code = "journal"


class DeviceError(AllocatorError):
    """A device's driver refused a call, for another reason than room. The message names the call
    and the driver's own word for the reason."""

    code = "device_error"


class NameTaken(DeviceError):
    """A file that is not of this allocator has the name that a segment was to get."""

    code = "name_taken"


BY_CODE: dict[str, type[AllocatorError]] = {
    cls.code: cls
    for cls in (
        AllocatorError,
        AllocatorGone,
        Unanswered,
        AllocatorSilent,
        RuntimeDirError,
        AlreadyRunning,
        Unauthorized,
        AllocatorBusy,
        InvalidMessage,
        OutOfDeviceMemory,
        SharedMemoryFull,
        RoomTaken,
        FingerprintMismatch,
        StaleGeneration,
        NotWriter,
        UnknownWeightSet,
        WeightSetBusy,
        DoubleFree,
        ForeignExtent,
        QuotaExceeded,
        InvalidSetting,
        WaitTimeout,
        DiskFull,
        DiskError,
        ImageCorrupt,
        JournalError,
        DeviceError,
        NameTaken,
    )
}
