"""A weight set in a client: read-only where it is sealed, writable while it is made.

Owns the mappings of one set. Invariants: nothing is sealed before every byte of it was written and
digested; a writer that leaves without a seal gives its election back.
"""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from allocator import backends, messages
from allocator.client.session.connection import Connection, expect
from allocator.client.session.shortage import Shortage
from allocator.digests import differing, digest
from allocator.errors import (
    AllocatorError,
    AllocatorGone,
    InvalidMessage,
    StaleGeneration,
    UnknownWeightSet,
)
from allocator.lifeline import close_all
from allocator.messages import Extent, Handle, Manifest

if TYPE_CHECKING:
    import torch


class WeightSetReader:
    """A sealed weight set, mapped read-only. Tensors taken from it keep the mapping alive."""

    def __init__(
        self,
        connection: Connection,
        key: str,
        sealed: messages.Sealed,
        descriptors: Sequence[int] = (),
    ):
        self._connection = connection
        self._epoch = connection.epoch
        self.key = key
        self.sealed = sealed
        """For a process of one's own that is to map it, by a `WeightSetView`."""
        self.handle = sealed.handle
        self.files = sealed.files
        self._mappings: list[backends.Mapping] = []
        try:
            self._mappings = [
                map_handle(sealed.handle, descriptors),
                *(map_handle(file) for file in sealed.files),
            ]
            self.manifest: Manifest = read_manifest(self._mappings[0], sealed.manifest)
        except BaseException:
            self.release()
            raise

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Name → aliased, read-only tensor. Imports torch."""
        from allocator.client.weights.tensor import tensors

        return tensors(self._mappings, self.manifest.tensors)

    def damaged(self) -> list[str]:
        """The names of tensors whose bytes do not have the digests of the manifest. Reads all.
        Raises TypeError for memory that the processor can't address."""
        return [
            name
            for index, mapping in enumerate(self._mappings)
            for name in differing(
                mapping.buffer,
                {n: e for n, e in self.manifest.tensors.items() if e.segment == index},
            )
        ]

    def release(self) -> None:
        """Tell the allocator that this session reads the set no longer. Drop the tensors first:
        they stay valid, but the memory they keep alive is no longer accounted for."""
        try:
            # A daemon that did not adopt the session never knew that we read the set: what it calls
            # by the same name and number is another one.
            if self._epoch == self._connection.epoch:
                release = messages.Release(key=self.key, generation=self.handle.generation)
                self._connection.give_back(release)
        except (StaleGeneration, UnknownWeightSet):
            if self._epoch == self._connection.epoch:  # it was only found out by asking
                raise
        finally:
            for mapping in self._mappings:
                mapping.close()


class WeightSetWriter:
    """The election to fill a weight set: reserve once, write, seal. Leaving it as a context without
    a seal abandons it, and the next process that waits is elected."""

    def __init__(self, connection: Connection, key: str, generation: int):
        self._connection = connection
        self.key = key
        self.generation = generation
        self._handle: Handle | None = None
        self._mapping: backends.Mapping | None = None
        self._ended = False

    def reserve(self, num_bytes: int) -> memoryview:
        """The one allocation of the whole set, mapped writable, its memory committed.

        Raises OutOfDeviceMemory, QuotaExceeded, TypeError for memory that the processor can't
        address: use `reserve_uncommitted` there.
        """
        return self._reserve(num_bytes, commit=True).buffer

    def reserve_uncommitted(self, num_bytes: int) -> backends.Mapping:
        """As `reserve`, for a writer that commits as it goes: by the mapping's `write`, or by
        `commit` before it writes through `buffer` or through tensors."""
        return self._reserve(num_bytes, commit=False)

    def writable_tensors(self, manifest: Manifest) -> "dict[str, torch.Tensor]":
        """The tensors that `manifest` describes, over the reserved segment, to be filled."""
        from allocator.client.weights.tensor import tensors

        return tensors([self._reserved()], manifest.tensors)

    def progress(self, num_bytes: int) -> None:
        """Let those who wait see how far the writing is. Without an allocator nobody does, and the
        writing goes on."""
        with contextlib.suppress(AllocatorGone):
            self._connection.request(
                messages.Progress(key=self.key, generation=self.generation, num_bytes=num_bytes),
                messages.Done,
            )

    def seal(
        self, manifest: Manifest, offset: int, files: Sequence[Handle] = ()
    ) -> WeightSetReader:
        """Write `manifest` at `offset`, give up write access and become a reader. Digests that
        the manifest lacks are made here. `files` are what entries of segment 1, 2 … lie in.

        Drop every writable tensor before: what still views the writable mapping keeps it alive.
        """
        mapping = self._reserved()
        mapping.complete()
        manifest = _with_digests(mapping, manifest)
        text = messages.encode(manifest)
        if offset + len(text) > mapping.num_bytes:
            raise InvalidMessage(
                f"the manifest takes {len(text)} bytes and does not fit behind the tensors: "
                "reserve what `manifest_bytes` says"
            )
        mapping.write(offset, text)
        mapping.close()
        return self._seal(
            Extent(offset=offset, num_bytes=len(text)),
            digest(memoryview(text)),
            files=tuple(files),
        )

    def seal_in_place(self, manifest: Extent, manifest_digest: str) -> WeightSetReader:
        """The image that the writer was elected with serves as it is."""
        return self._seal(manifest, manifest_digest, in_place=True)

    def seal_copy(self, manifest: Extent, manifest_digest: str) -> WeightSetReader:
        """The reserved segment is a copy of a sealed one, manifest and all."""
        self._reserved().close()
        return self._seal(manifest, manifest_digest)

    def abandon(self, *, discard_source: bool = False) -> None:
        """Give the election back. Idempotent; a no-op after the seal."""
        if self._ended:
            return
        self._ended = True
        if self._mapping is not None:
            self._mapping.close()
        self._connection.give_back(
            messages.Abandon(
                key=self.key, generation=self.generation, discard_source=discard_source
            ),
        )

    def _reserve(self, num_bytes: int, *, commit: bool) -> backends.Mapping:
        answer, descriptors = self._connection.exchange(
            messages.Reserve(key=self.key, generation=self.generation, num_bytes=num_bytes)
        )
        handle = expect(answer, messages.Reserved).handle
        self._handle = handle
        self._mapping = map_handle(handle, descriptors, writable=True, commit=False)
        self._mapping.on_shortage = Shortage(self._connection)
        if commit:
            self._mapping.commit(0, num_bytes)
        return self._mapping

    def _seal(
        self,
        manifest: Extent,
        manifest_digest: str,
        *,
        files: tuple[Handle, ...] = (),
        in_place: bool = False,
    ) -> WeightSetReader:
        answer, descriptors = self._connection.exchange(
            messages.Seal(
                key=self.key,
                generation=self.generation,
                manifest=manifest,
                manifest_digest=manifest_digest,
                files=files,
                in_place=in_place,
            )
        )
        self._ended = True
        sealed = expect(answer, messages.Sealed)
        return WeightSetReader(self._connection, self.key, sealed, descriptors)

    def _reserved(self) -> backends.Mapping:
        if self._mapping is None:
            raise InvalidMessage("reserve the segment first")
        return self._mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.abandon()
        except AllocatorError:  # as where the seal was done, and only its answer was lost
            if error is None:
                raise


def map_handle(
    handle: Handle,
    descriptors: Sequence[int] = (),
    *,
    writable: bool = False,
    commit: bool = True,
) -> backends.Mapping:
    """Map what the handle names; the descriptors that came with it are closed."""
    try:
        return backends.for_handle(handle).map(
            handle,
            writable=writable,
            commit=commit,
            descriptor=descriptors[0] if descriptors else None,
        )
    finally:
        close_all(descriptors)


def read_manifest(mapping: backends.Mapping, extent: Extent) -> Manifest:
    """The manifest that lies there. Raises InvalidMessage."""
    text = bytearray(extent.num_bytes)
    mapping.read(extent.offset, memoryview(text))
    try:
        return messages.decode_manifest(memoryview(text))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"the manifest can't be read: {error}") from error


def _with_digests(mapping: backends.Mapping, manifest: Manifest) -> Manifest:
    """The manifest with a digest for every tensor of the segment; as it is for memory that the
    processor can't read."""
    missing = {
        (entry.offset, entry.num_bytes)
        for entry in manifest.tensors.values()
        if entry.segment == 0 and not entry.digest
    }
    if not missing:
        return manifest
    try:
        buffer = mapping.buffer
    except TypeError:
        return manifest

    def made(extent: tuple[int, int]) -> str:
        with buffer[extent[0] : extent[0] + extent[1]] as view:
            return digest(view)

    order = sorted(missing, key=lambda extent: extent[1], reverse=True)
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as threads:
        digests = dict(zip(order, threads.map(made, order), strict=True))
    tensors = {
        name: msgspec.structs.replace(
            entry, digest=digests.get((entry.offset, entry.num_bytes), entry.digest)
        )
        for name, entry in manifest.tensors.items()
    }
    return msgspec.structs.replace(manifest, tensors=tensors)


__all__ = ["WeightSetReader", "WeightSetWriter", "map_handle", "read_manifest"]
