"""A checkpoint rounded into a new folder: everything from its headers to the final name.

Owns the order, and the folder in which an output grows, `.NAME.quantizing` beside it. Invariants:
the final name appears complete, in one step, after all of it was read back; a process that ends at
any moment leaves what the same command goes on with, to the same bytes; a source that changed is
noticed, and nothing that is there is overwritten.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from allocator import DiskFull
from workers.config.model_file import file_identity, opened
from workers.errors import CheckpointChanged, OutputDamaged, OutputExists, QuantizationRefused
from workers.quantize.gguf_source import GGUFSource
from workers.quantize.journal import Journal
from workers.quantize.kernels import rounding
from workers.quantize.plan import Input, Kept, Plan, Rounded
from workers.quantize.policy import Decision, decide, head_module
from workers.quantize.request import Group, Made, Request, Tell
from workers.quantize.scheme import FORMAT_VERSION, UNROUNDED, Scheme, scheme_of
from workers.quantize.source import SafetensorsSource, Source
from workers.quantize.units import write_all
from workers.quantize.work import Work

_VERSION: Final = 1
"""Goes up whenever the same request would be written otherwise."""
_LEAST_PIECE_BYTES: Final = 1 << 12
_MOST_THREADS: Final = 16
"""More would only wait for the disk."""
_MOST_SHOWN: Final = 4
_SPARE_BYTES: Final = 64 << 20


def quantize(request: Request, tell: Tell) -> Made:
    """All of it. `tell` is called in this thread, some times a second.

    Raises QuantizationRefused, OutputExists, OutputDamaged, CheckpointError, DiskFull, OSError; an
    interruption leaves what the next run goes on with.
    """
    began = time.monotonic()
    destination = _destination(request.destination)
    staging = destination.with_name(f".{destination.name}.quantizing")
    if os.path.lexists(destination):
        _forget_finished(staging)
        raise OutputExists(f"{destination} exists: remove it, or choose another name")
    with contextlib.closing(_opened(request)) as source:
        decided = _decided(source, request)
        scheme = _scheme(request, [one for one, what in decided if what.action == "round"])
        said = _said(source, request, scheme)
        num_threads = request.num_threads or min(_MOST_THREADS, _num_processors() + 1)
        piece_bytes = max(_LEAST_PIECE_BYTES, request.chunk_bytes // num_threads)
        staging.mkdir(exist_ok=True)
        journal = Journal.opened(staging / "journal")
        with contextlib.ExitStack() as stack:
            if journal is not None:
                stack.callback(journal.close)
                journal.check(said)
                piece_bytes = int(journal.said["piece_bytes"])
            plan = Plan(
                [(one, what.action == "round") for one, what in decided], scheme, piece_bytes
            )
            output = staging / "output"
            if journal is None:
                _check_room(staging, plan)
                journal = Journal.begun(
                    staging / "journal", {**said, "piece_bytes": piece_bytes}, plan.num_units
                )
                stack.callback(journal.close)
            output.mkdir(exist_ok=True)
            files = [
                stack.enter_context(_output_file(file, size)) for file, size in _named(output, plan)
            ]
            source.open()
            _write_headers(plan, files)
            rounds = rounding()
            work = Work(plan, source, files, journal, rounds, num_threads)
            try:
                work.run(tell)
            except QuantizationRefused:  # and will be, until the source is another
                shutil.rmtree(staging)
                raise
            _check_headers(plan, files)
            _write_side_files(source, output)
            _write_config(source, output, plan, decided)
            if _said(source, request, scheme)["source"] != said["source"]:
                raise CheckpointChanged(
                    f"{request.source} has changed while it was read: remove {staging}, and begin "
                    "anew"
                )
            _publish(output, destination)
        shutil.rmtree(staging)
        return _made(
            *(request, plan, decided, rounds.name, work.resumed_bytes),
            *(time.monotonic() - began, work.rounded_s),
        )


# --- before


def _destination(given: Path) -> Path:
    destination = given.expanduser().absolute()
    if not destination.name or not destination.parent.is_dir():
        raise OutputExists(f"{destination.parent} is no folder: make it first")
    return destination


def _opened(request: Request) -> Source:
    if request.source.is_dir():
        return SafetensorsSource(request.source)
    return GGUFSource(request.source, request.tokenizer)


def _num_processors() -> int:
    return len(os.sched_getaffinity(0))


def _decided(source: Source, request: Request) -> list[tuple[Input, Decision]]:
    """Raises QuantizationRefused for what nobody could describe, and where nothing is rounded."""
    if request.scheme is None:
        return [(one, Decision("keep", "tensors")) for one in source.tensors()]
    model_type = str(source.config.get("model_type"))
    found = [
        (one, decide(one.name, one.dtype, one.shape, model_type, request.choices))
        for one in source.tensors()
    ]
    refused = [(one, what) for one, what in found if what.action == "refuse"]
    if refused:
        one, what = refused[0]
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise QuantizationRefused(
            f"{one.name} {list(one.shape)} can't be quantized: {what.reason}{more}. To leave such "
            f"tensors as they are, add --keep {_pattern([one.name for one, _ in refused])!r}"
        )
    if not any(what.action == "round" for _, what in found):
        raise QuantizationRefused(f"{request.source} holds no linear that could be quantized")
    return found


def _pattern(names: list[str]) -> str:
    """One that finds them: what their names end in."""
    endings = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})
    return "|".join(re.escape(ending) for ending in endings[:_MOST_SHOWN])


def _scheme(request: Request, rounded: list[Input]) -> Scheme:
    if request.scheme is None:
        return UNROUNDED
    scheme = scheme_of(
        request.scheme,
        request.group_size,
        request.symmetric,
        request.searches_clip,
        [one.shape[1] for one in rounded],
    )
    size = scheme.group_size
    if size is not None:
        uneven = [one for one in rounded if one.shape[1] % size]
        if uneven:
            smaller = "choose a smaller --group-size, " if size > 32 else ""
            raise QuantizationRefused(
                f"{uneven[0].name} has {uneven[0].shape[1]} columns, which are no groups of {size} "
                f"({len(uneven)} tensors): {smaller}a scheme with a scale for each row (w8a16 "
                f"without --group-size), or --keep {_pattern([one.name for one in uneven])!r}"
            )
    return scheme


def _said(source: Source, request: Request, scheme: Scheme) -> dict[str, Any]:
    """All that the bytes of the output follow from, but the size of a piece, which they do not."""
    return {
        "version": _VERSION,
        "format": FORMAT_VERSION,
        "source": {
            **source.identity(),
            **{name: file_identity(path) for name, path in source.side_files()},
        },
        "options": {
            "scheme": [
                *(scheme.name, scheme.group_size, scheme.symmetric),
                scheme.num_candidates,
            ],
            "keep": list(request.choices.keep),
            "rounds_head": request.choices.rounds_head,
        },
    }


def _check_room(folder: Path, plan: Plan) -> None:
    """Raises DiskFull."""
    status = os.statvfs(folder)
    free, needed = status.f_bavail * status.f_frsize, sum(plan.files) + _SPARE_BYTES
    if free < needed:
        raise DiskFull(
            f"{folder.parent} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed: "
            "make room there, or choose another place"
        )


# --- the output


def _named(output: Path, plan: Plan) -> list[tuple[Path, int]]:
    count = len(plan.files)
    if count == 1:
        return [(output / "model.safetensors", plan.files[0])]
    return [
        (output / f"model-{number:05d}-of-{count:05d}.safetensors", size)
        for number, size in enumerate(plan.files, 1)
    ]


@contextlib.contextmanager
def _output_file(path: Path, num_bytes: int) -> Iterator[int]:
    """Its room is taken at once. Raises DiskFull, OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(
                f"{path.parent} has no room for {num_bytes / 1e9:.2f} GB ({error.strerror}): make "
                "room there, or choose another place"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _headers(plan: Plan) -> Iterator[tuple[int, int, bytes]]:
    """File, offset, bytes: what no unit writes."""
    for file, header in enumerate(plan.headers):
        yield file, 0, header
    for shape in plan.shapes:
        words = b"".join(length.to_bytes(8, "little") for length in shape.value)
        yield shape.output.file, shape.output.begin, words


def _write_headers(plan: Plan, files: list[int]) -> None:
    for file, begin, data in _headers(plan):
        write_all(files[file], begin, memoryview(data))


def _check_headers(plan: Plan, files: list[int]) -> None:
    for file, begin, data in _headers(plan):
        if os.pread(files[file], len(data), begin) != data:
            raise OutputDamaged(
                "what lies on the disk of a file's header is not what was written: see whether the "
                "disk is sound, and run the same command again"
            )


def _write_side_files(source: Source, output: Path) -> None:
    for name, path in source.side_files():
        target = output / name
        target.parent.mkdir(exist_ok=True)
        with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as read:
            _write(target, read)


def _write_config(
    source: Source, output: Path, plan: Plan, decided: list[tuple[Input, Decision]]
) -> None:
    kept = [what.module for _, what in decided if what.action == "keep" and what.module]
    head = head_module([one.name for one, _ in decided], str(source.config.get("model_type")))
    ignored = [*kept, *([head] if head else [])]
    config = dict(source.config)
    if plan.scheme != UNROUNDED:
        config["quantization_config"] = plan.scheme.quantization_config(ignored)
    _write(output / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    if len(plan.files) > 1:
        names = [path.name for path, _ in _named(output, plan)]
        index = {
            "metadata": {"total_size": sum(one.num_bytes for one in plan.outputs())},
            "weight_map": {one.name: names[one.file] for one in plan.outputs()},
        }
        data = json.dumps(index, indent=2).encode()
        _write(output / "model.safetensors.index.json", data)


def _write(path: Path, content: Any) -> None:
    """On the disk when it returns."""
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _publish(output: Path, destination: Path) -> None:
    """Gives the output its name. Raises OutputExists."""
    for folder in (*(one for one in output.iterdir() if one.is_dir()), output):
        _sync_folder(folder)
    if os.path.lexists(destination):
        raise OutputExists(f"{destination} has come to exist meanwhile: rename or remove it")
    output.rename(destination)
    _sync_folder(destination.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget_finished(staging: Path) -> None:
    """What a run left that ended after it had given the name."""
    if (staging / "journal").exists() and not (staging / "output").exists():
        shutil.rmtree(staging)


# --- what was made


def _made(
    request: Request,
    plan: Plan,
    decided: list[tuple[Input, Decision]],
    rounds: str,
    resumed_bytes: int,
    seconds: float,
    rounded_seconds: float,
) -> Made:
    sizes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    rounded_bits = rounded_weights = 0
    for (one, what), tensor in zip(decided, plan.tensors, strict=True):
        becomes = tensor.output.num_bytes if isinstance(tensor, Kept) else _rounded_bytes(tensor)
        size = sizes[what.action, what.reason]
        size[0] += 1
        size[1] += one.num_bytes
        size[2] += becomes
        if isinstance(tensor, Rounded):
            rounded_bits += 8 * becomes
            rounded_weights += one.shape[0] * one.shape[1]
    return Made(
        destination=request.destination,
        scheme=plan.scheme.name,
        group_size=plan.scheme.group_size,
        format=plan.scheme.format,
        rounding=rounds,
        groups=tuple(Group(*what, *size) for what, size in sizes.items()),
        source_bytes=plan.source_bytes,
        output_bytes=sum(plan.files),
        resumed_bytes=resumed_bytes,
        bits_per_weight=rounded_bits / rounded_weights if rounded_weights else None,
        seconds=seconds,
        rounded_seconds=rounded_seconds,
    )


def _rounded_bytes(tensor: Rounded) -> int:
    parts = (tensor.levels, tensor.scales, tensor.zero_points)
    return sum(part.num_bytes for part in parts if part is not None)
