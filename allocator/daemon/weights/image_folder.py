"""The lowest tier: a folder of images, as a device uses it.

Owns which file is whose image. Invariants: a file counts only as long as its record can be read and
its identity is the one that was noted; what another daemon put in its place is never deleted; what
was given up stays so, whether or not its file could be deleted; a folder that can't be read or
written is an error of whoever needs it at that moment, and of nobody else. Knows nothing of who
wants an image.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from allocator import images
from allocator.backends import for_handle
from allocator.daemon.weights.weight_set import Copy
from allocator.errors import AllocatorError, DiskError, ImageCorrupt, InvalidMessage
from allocator.messages import Extent, Handle
from allocator.processes.identity import ProcessIdentity

log = logging.getLogger("onecopy.allocator")


class ImageFolder:
    """It need not exist before the first image is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._given_up: set[str] = set()
        """Identities of images that nobody may find again, though they are still there."""

    def find(self, key: str, fingerprint: Mapping[str, str]) -> Copy | None:
        """The image of that set, if there is a whole one."""
        try:
            return self._copy(self.path / images.image_name(key, fingerprint))
        except FileNotFoundError:
            return None
        except (ImageCorrupt, DiskError, OSError) as error:
            log.warning("%s", error)
            return None

    def written(self, key: str, fingerprint: Mapping[str, str]) -> Handle:
        """The image that a client says it has just written. Raises InvalidMessage."""
        try:
            return self._copy(self.path / images.image_name(key, fingerprint)).handle
        except (ImageCorrupt, DiskError, OSError) as error:
            raise InvalidMessage(f"there is no image of {key!r}: {error}") from error

    def all(self) -> Iterator[tuple[str, dict[str, str], Copy]]:
        """(key, fingerprint, copy) of every whole image."""
        for path, _ in images.list_images(self.path):
            try:
                record, identity = images.read_record(path)
            except (AllocatorError, OSError) as error:  # it went meanwhile: another's folder, too
                log.warning("%s", error)
                continue
            if identity not in self._given_up:
                yield record.key, record.fingerprint, _image_copy(path, record, identity)

    def discard(self, image: Handle) -> bool:
        """Delete it, if it still is the file that was meant. Raises DiskError where it can't be
        deleted."""
        if for_handle(image).identity(image.segment) != image.identity:
            return False
        try:
            Path(image.segment).unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(
                f"the image {image.segment} can't be deleted: {error.strerror}. See that the "
                "folder can be written, or delete the file by hand."
            ) from error
        return True

    def give_up(self, image: Handle) -> None:
        """It can't be deleted, and nobody is to find it again."""
        self._given_up.add(image.identity)

    def remove_leftovers(self, ending: ProcessIdentity | None = None) -> None:
        """Delete what writers that are gone, or `ending`, have not finished."""
        images.remove_leftovers(self.path, ending)

    def _copy(self, path: Path) -> Copy:
        record, identity = images.read_record(path)
        if identity in self._given_up:
            raise FileNotFoundError(path)
        return _image_copy(path, record, identity)


def _image_copy(path: Path, record: images.ImageRecord, identity: str) -> Copy:
    handle = Handle(
        backend="file",
        segment=str(path),
        num_bytes=record.num_bytes,
        generation=0,
        identity=identity,
    )
    manifest = Extent(offset=record.manifest_offset, num_bytes=record.manifest_num_bytes)
    return Copy(handle, manifest, record.manifest_digest)
