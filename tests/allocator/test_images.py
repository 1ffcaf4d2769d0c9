"""Images on disk: the format byte for byte, damage of every kind, kills and full disks."""

import logging
import mmap
import os
import resource
import signal
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allocator import ProcessIdentity
from allocator.digests import digest
from allocator.errors import DiskError, DiskFull, ImageCorrupt
from allocator.images import (
    ImageRecord,
    image_name,
    list_images,
    read_record,
    remove_leftovers,
    write_image,
)
from allocator.messages import Extent
from tests.allocator.backends.doomed import Doomed, Report
from tests.allocator.processes import in_fork
from tests.mount_namespace import run_on_tmpfs

MIB = 1 << 20
NOBODY = 65534
FINGERPRINT = {"dtype": "bf16", "layout": "1"}
CONTENT = bytes(range(256)) * 20 + b"manifest"
MANIFEST = Extent(offset=5120, num_bytes=8)
pytestmark = pytest.mark.usefixtures("no_leaks")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")


def write(folder: Path, content: bytes = CONTENT, manifest: Extent = MANIFEST) -> Path:
    return write_image(folder, "smollm2", FINGERPRINT, memoryview(content), manifest, _ignore)


def _ignore(_num_bytes: int) -> None:
    return


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Damage an image: it is read-only, so root or its owner must insist."""
    path.chmod(0o600)
    path.write_bytes(content)


def ending(footer: bytes) -> bytes:
    """A footer and the trailer that fits it."""
    checksum = xxhash.xxh3_64_intdigest(footer)
    return footer + struct.pack("<QQ", len(footer), checksum) + b"1copyimg"


def fields(**changed: Any) -> dict[str, Any]:
    """A good footer's, and what is to be changed in it."""
    good = {
        "version": 1,
        "key": "smollm2",
        "fingerprint": FINGERPRINT,
        "num_bytes": len(CONTENT),
        "manifest_offset": MANIFEST.offset,
        "manifest_num_bytes": MANIFEST.num_bytes,
        "manifest_digest": digest(memoryview(b"manifest")),
    }
    return good | changed


def image_of(footer: bytes) -> bytes:
    """CONTENT, padded to 8192, and this footer."""
    return CONTENT + bytes(8192 - len(CONTENT)) + ending(footer)


# --- what was written is read


def test_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b")
    assert path.read_bytes() == image_of(msgspec.msgpack.encode(fields()))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o400
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("num_bytes", [8, 4095, 4096, 4097, 8 * MIB, 20 * MIB + 3])
def test_round_trip(tmp_path: Path, num_bytes: int) -> None:
    content = os.urandom(num_bytes)
    manifest = Extent(offset=num_bytes - 5, num_bytes=5)
    progress: list[int] = []
    source = memoryview(content)
    path = write_image(tmp_path, "k", FINGERPRINT, source, manifest, progress.append)
    record, identity = read_record(path)
    assert record == ImageRecord(
        key="k",
        fingerprint=FINGERPRINT,
        num_bytes=num_bytes,
        manifest_offset=manifest.offset,
        manifest_num_bytes=5,
        manifest_digest=digest(source[-5:]),
    )
    assert record.manifest == manifest
    status = path.stat()
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    assert identity == ":".join(map(str, parts))
    assert progress == [*range(8 * MIB, num_bytes, 8 * MIB), num_bytes]
    with path.open("rb") as file, mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ) as seen:
        assert seen[:] == content
    assert list_images(tmp_path) == [(path, record)]


def test_names_stay() -> None:
    # An image that is on a disk must be found by the next version, too.
    assert image_name("smollm2", FINGERPRINT) == "e409d0d15b30691e9a9f2b3212c9df33.weights"


def test_names_are_of_key_and_fingerprint() -> None:
    names = [
        image_name(key, fingerprint)
        for key, fingerprint in [
            ("a", {}),
            ("b", {}),
            ("a", {"b": ""}),
            ("a", {"": "b"}),
            ("ab", {}),
            ("a", {"b": "", "c": "d"}),
            ("a", {"b": "d", "c": ""}),
            ("../../a", {"/": "\0"}),
        ]
    ]
    assert len(set(names)) == len(names)
    assert all(set(name.removesuffix(".weights")) <= set("0123456789abcdef") for name in names)
    assert image_name("a", {"x": "1", "y": "2"}) == image_name("a", {"y": "2", "x": "1"})


def test_a_newer_image_replaces_the_older(tmp_path: Path) -> None:
    path = write(tmp_path)
    _, before = read_record(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 5120, prot=mmap.PROT_READ) as mapped:
        assert write(tmp_path, bytes(5120) + b"manifest") == path
        assert mapped[:] == CONTENT[:5120]  # who maps the older one keeps it
    assert path.read_bytes()[:5120] == bytes(5120)
    assert read_record(path)[1] != before
    assert len(list_images(tmp_path)) == 1


@pytest.mark.parametrize(
    "manifest", [Extent(offset=len(CONTENT), num_bytes=1), Extent(offset=0, num_bytes=1 << 62)]
)
def test_a_manifest_outside_the_segment(tmp_path: Path, manifest: Extent) -> None:
    with pytest.raises(ValueError, match="outside the segment"):
        write(tmp_path, CONTENT, manifest)
    assert not list(tmp_path.iterdir())


def test_the_end_of_progress_is_the_end_of_writing(tmp_path: Path) -> None:
    def stop(_num_bytes: int) -> None:
        assert len(list(tmp_path.glob(".tmp-*"))) == 1
        raise ZeroDivisionError

    source = memoryview(CONTENT)
    with pytest.raises(ZeroDivisionError):
        write_image(tmp_path, "k", {}, source, MANIFEST, stop)
    assert not list(tmp_path.iterdir())
    source.release()  # raises BufferError where a view is left


# --- damage


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    overwrite(path, whole)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ImageCorrupt, match="is not a whole image"):
            read_record(path)


@pytest.mark.parametrize("more", [b"\0", b"x", bytes(4096), b"1copyimg"])
def test_something_behind_it(tmp_path: Path, more: bytes) -> None:
    path = write(tmp_path)
    overwrite(path, path.read_bytes() + more)
    with pytest.raises(ImageCorrupt):
        read_record(path)


def test_an_image_in_an_image(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    overwrite(path, bytes(4096) + whole)
    with pytest.raises(ImageCorrupt, match="does not fit a file of"):
        read_record(path)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_any_single_byte_flipped(tmp_path: Path, flip: int) -> None:
    path = write(tmp_path)
    whole = bytearray(path.read_bytes())
    manifest = range(MANIFEST.offset, MANIFEST.offset + MANIFEST.num_bytes)
    for at in [*manifest, *range(8192, len(whole))]:
        whole[at] ^= flip
        overwrite(path, whole)
        with pytest.raises(ImageCorrupt):
            read_record(path)
        whole[at] ^= flip
    # The tensors are not its matter: those have digests of their own, in the manifest.
    whole[0] ^= flip
    overwrite(path, whole)
    assert read_record(path)[0].num_bytes == len(CONTENT)


@pytest.mark.parametrize(
    ("footer", "complaint"),
    [
        (fields(version=2), "version"),
        (fields(key=""), "key"),
        (fields(key=None), "key"),
        (fields(fingerprint={"a": 1}), "fingerprint"),
        (fields(fingerprint={str(n): "" for n in range(257)}), "fingerprint"),
        (fields(more=1), "more"),
        ({"version": 1}, "missing required"),
        ([], "Expected `object`"),
        (fields(num_bytes=-1), "num_bytes"),
        (fields(num_bytes=4096), "4096 bytes does not fit a file of"),
        (fields(num_bytes=8193), "8193 bytes does not fit a file of"),
        (fields(num_bytes=1 << 62), "does not fit a file of"),
        (fields(num_bytes=1 << 63), "num_bytes"),
        (fields(manifest_offset=len(CONTENT) - 7), "manifest lies outside"),
        (fields(manifest_num_bytes=1 << 62), "manifest lies outside"),
        (fields(manifest_offset=1 << 62, manifest_num_bytes=1 << 62), "manifest lies outside"),
        (fields(manifest_offset=0), "manifest does not match its digest"),
        (fields(manifest_num_bytes=0), "manifest does not match its digest"),
        (fields(manifest_digest=""), "manifest does not match its digest"),
    ],
)
def test_a_footer_that_lies(tmp_path: Path, footer: Any, complaint: str) -> None:
    path = tmp_path / "x.weights"
    path.write_bytes(image_of(msgspec.msgpack.encode(footer)))
    with pytest.raises(ImageCorrupt, match=complaint):
        read_record(path)


@pytest.mark.parametrize("footer_bytes", [0, 1, 8192 + 300, 3 * MIB, 1 << 62, (1 << 64) - 1])
def test_a_trailer_that_lies(tmp_path: Path, footer_bytes: int) -> None:
    path = tmp_path / "x.weights"
    whole = image_of(msgspec.msgpack.encode(fields()))
    path.write_bytes(bytes(4 * MIB) + whole[:-24] + struct.pack("<Q", footer_bytes) + whole[-16:])
    with pytest.raises(ImageCorrupt):
        read_record(path)


def never_but_corrupt(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.weights"
        path.write_bytes(content)
        with pytest.raises(ImageCorrupt):
            read_record(path)


@settings(deadline=None)  # the disk is shared
@given(st.binary(max_size=10_000))
def test_garbage(content: bytes) -> None:
    never_but_corrupt(content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)  # the disk is shared
@given(st.binary(max_size=500) | VALUES.map(msgspec.msgpack.encode))
@example(b"\x91" * 100_000)
@example(b"\x81\xa3key\xa1\xff")
def test_garbage_with_the_right_checksum(footer: bytes) -> None:
    never_but_corrupt(image_of(footer))


@settings(deadline=None)  # the disk is shared
@given(st.dictionaries(st.sampled_from(sorted(fields())), VALUES, min_size=1))
def test_any_value_in_a_footer(changed: dict[str, Any]) -> None:
    footer = fields(**changed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.weights"
        path.write_bytes(image_of(msgspec.msgpack.encode(footer)))
        try:
            record, _ = read_record(path)
        except ImageCorrupt:
            return
        assert msgspec.to_builtins(record) == footer  # the new values happen to be good ones


# --- what is not a file of ours


def make_link(path: Path) -> None:
    path.symlink_to(write(path.parent / "elsewhere"))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file away needs root")
    write(path.parent / "elsewhere").rename(path)
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize("make", [make_link, os.mkfifo, Path.mkdir, make_socket, give_away])
def test_not_a_file_of_ours(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x.weights"
    make(path)
    with pytest.raises(ImageCorrupt, match=r"x\.weights is not a regular file of ours"):
        read_record(path)
    assert list_images(tmp_path) == []


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "x.weights")
    assert list_images(tmp_path / "missing") == []
    assert remove_leftovers(tmp_path / "missing") == []


@as_root
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    refused = in_fork(lambda: str(read_record(path)), uid=NOBODY).text
    assert refused == f"DiskError: the image {path} can't be read: Permission denied"


def test_a_list_leaves_out_what_is_corrupt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [write_image(tmp_path, key, {}, memoryview(CONTENT), MANIFEST, _ignore) for key in "abc"]
    overwrite(good[1], good[1].read_bytes()[:-1])
    (tmp_path / "notes.txt").write_text("not an image, and nobody says it were")
    images = list_images(tmp_path)
    assert [path for path, _ in images] == sorted([good[0], good[2]])
    assert {record.key for _, record in images} == {"a", "c"}
    [logged] = caplog.records
    assert logged.levelno == logging.WARNING
    assert good[1].name in logged.getMessage()


# --- leftovers and kills


def test_leftovers_are_those_of_the_dead(tmp_path: Path) -> None:
    own = ProcessIdentity.own()
    with Doomed(lambda _report: signal.pause()) as writer:
        alive = ProcessIdentity.of(writer.pid)
        assert alive is not None
        keep = [
            f".tmp-{own.pid}-{own.start_ticks}-0011",
            f".tmp-{alive.pid}-{alive.start_ticks}-0011",
            ".tmp-of-somebody-else",
            f".tmp-{own.pid}",
            "notes.txt",
        ]
        dead = [f".tmp-{own.pid}-{own.start_ticks + 1}-0011"]  # the pid has been used again
        for name in [*keep, *dead]:
            (tmp_path / name).write_bytes(b"x")
        assert remove_leftovers(tmp_path) == dead
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
    assert remove_leftovers(tmp_path) == [keep[1]]


@as_root
def test_leftovers_that_cannot_be_deleted() -> None:
    own = ProcessIdentity.own()
    with tempfile.TemporaryDirectory(prefix="onecopy-", dir="/tmp") as folder:
        leftover = Path(folder) / f".tmp-{own.pid}-{own.start_ticks + 1}-0011"
        leftover.write_bytes(b"x")
        os.chown(folder, NOBODY, NOBODY)
        Path(folder).chmod(0o500)
        assert in_fork(lambda: str(remove_leftovers(Path(folder))), uid=NOBODY).text == "[]"
        assert leftover.exists()


def test_a_writer_killed_half_way_leaves_no_image(tmp_path: Path) -> None:
    def write_half(report: Report) -> None:
        def progress(num_bytes: int) -> None:
            report(num_bytes)
            if num_bytes == 16 * MIB:
                signal.pause()

        write_image(tmp_path, "k", {}, memoryview(bytes(32 * MIB)), MANIFEST, progress)

    with Doomed(write_half) as writer:
        assert [writer.read(), writer.read()] == [8 * MIB, 16 * MIB]
        [leftover] = tmp_path.iterdir()
        assert leftover.name.startswith(".tmp-")
        assert leftover.stat().st_mode & 0o777 == 0o600
        assert remove_leftovers(tmp_path) == []  # its writer is at work
        writer.kill()
    assert [path.name for path in tmp_path.iterdir()] == [leftover.name]
    assert list_images(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / image_name("k", {}))
    assert remove_leftovers(tmp_path) == [leftover.name]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("acknowledged", [1, 2, 3, 10])
def test_killed_at_any_moment_the_image_is_whole(tmp_path: Path, acknowledged: int) -> None:
    def content(number: int) -> bytes:
        return bytes([number % 251]) * (100_000 + number)

    def replace(report: Report) -> None:
        number = 0
        while True:
            write(tmp_path, content(number))
            report(number)
            number += 1

    with Doomed(replace) as writer:
        for number in range(acknowledged):
            assert writer.read() == number
        last = writer.kill()
    path = tmp_path / image_name("smollm2", FINGERPRINT)
    record, _ = read_record(path)
    number = record.num_bytes - 100_000
    known = acknowledged - 1 if last is None else last
    assert number in (known, known + 1)
    assert path.read_bytes()[: record.num_bytes] == content(number)
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- a disk that can't


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The write that reaches the limit stops short, the next one fails."""
    path = write(tmp_path)
    before = read_record(path)

    def reach_the_limit() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9 * MIB + 5, resource.RLIM_INFINITY))
        progress: list[int] = []
        source = memoryview(bytes(20 * MIB))
        try:
            write_image(tmp_path, "smollm2", FINGERPRINT, source, MANIFEST, progress.append)
        except DiskFull as error:
            assert progress == [8 * MIB]
            return str(error)
        return "written"

    said = in_fork(reach_the_limit).text
    assert said.startswith(f"an image of 21.0 MB can't be written to {tmp_path} (File too large)")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert read_record(path) == before


def test_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder, reason in [
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "file", "File exists"),
        (Path("/proc/onecopy"), "No such file or directory"),
    ]:
        expected = rf"an image of 0\.0 MB can't be written to {folder} \({reason}\), .*see that it"
        with pytest.raises(DiskError, match=expected):
            write(folder)


@as_root
def test_a_folder_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory(prefix="onecopy-", dir="/tmp") as path:
        folder = Path(path)
        os.chown(folder, NOBODY, NOBODY)
        folder.chmod(0o500)
        refused = in_fork(lambda: str(write(folder)), uid=NOBODY).text
        assert refused.startswith("DiskError: an image of 0.0 MB can't be written to")
        assert "(Permission denied), where" in refused
        assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def on_small_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/allocator/images_on_small_disk.py found on a disk of 24 MiB."""
    folder = str(tmp_path_factory.mktemp("disk"))
    return run_on_tmpfs("size=24m", folder, "tests.allocator.images_on_small_disk", folder)


def test_images_on_a_full_disk(on_small_disk: dict[str, Any]) -> None:
    found = on_small_disk
    assert "an image of 33.6 MB can't be written to" in found["too_large"]
    assert "(No space left on device), where 25.2 MB are free: delete" in found["too_large"]
    assert found["too_large_progress"] == []  # nothing was written in vain
    assert "an image of 21.0 MB can't be written to" in found["midway"]
    # 3 MiB were left beside the 8 that were written, which are free again.
    assert "(No space left on device), where 11.5 MB are free: delete" in found["midway"]
    assert found["midway_progress"] == [8 * MIB]
    assert found["midway_left"] == ["another program's"]
    assert found["then"] == 20 * MIB


def test_a_journal_on_a_full_disk(on_small_disk: dict[str, Any]) -> None:
    found = on_small_disk
    assert "can't take a record: " in found["append"]
    assert found["appended"] > 10
    assert found["length"]
    assert found["good"]
    assert "can't be written: No space left on device" in found["rewrite"]
    assert found["good_after_rewrite"]
    assert found["good_with_more"]
    assert found["left"] == []
