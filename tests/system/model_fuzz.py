"""Random damage to a sound model's files, the same for the same seed.

Owns the ways to damage. As a program it tries many, and tells what must not be:
`python -m tests.system.model_fuzz FIRST_SEED COUNT [gguf]`.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.workers.checkpoint.checkpoint_files import write_gguf

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 16, 63, 1 << 16, 1_000_000, 10**9, 10**12, 1 << 63),
    *(-(1 << 63), 10**30, 0.0, -0.5, 1e-300, 1e300, float("inf"), float("nan")),
    *("", "x", "llama", "float16", "float8_e4m3fn", "full_attention", "silu", "a" * 10_000, "\0"),
    *([], [0], [None], ["x"], [[]], {}, {"x": 1}, {"type": "x"}, {"rope_type": "yarn"}),
)


def spoil_json(chance: random.Random, document: Any) -> Any:
    """One to three of its values are others, gone, or there twice."""
    document = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.7:
                at = at[key]
                continue
            what = chance.random()
            if what < 0.15:
                del at[key]
            elif what < 0.3 and isinstance(at[key], int | float):
                at[key] = at[key] * chance.choice((-1, 2, 1000, 10**7, 0.5)) + chance.choice((0, 1))
            elif what < 0.4 and isinstance(at[key], str):
                at[key] = chance.choice((at[key] * 2, at[key][:-1], at[key].upper(), "é" + at[key]))
            elif what < 0.45 and isinstance(at, list):
                at.extend([copy.deepcopy(at[key])] * chance.choice((1, 100, 3000)))
            else:
                at[key] = copy.deepcopy(chance.choice(VALUES))
            break
    return document


def spoil_bytes(chance: random.Random, content: bytes) -> bytes:
    """Bits are flipped, mostly near the beginning; or it is cut, or a part is there twice."""
    spoiled = bytearray(content)
    what = chance.random()
    if what < 0.2:
        return bytes(spoiled[: chance.randrange(len(spoiled) + 1)])
    if what < 0.3:
        start = chance.randrange(len(spoiled))
        end = min(len(spoiled), start + chance.randrange(1, 5000))
        return bytes(spoiled[:end] + spoiled[start:])
    most = len(spoiled) if chance.random() < 0.2 else min(len(spoiled), 4096)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        at = chance.randrange(most)
        if chance.random() < 0.5:
            spoiled[at] ^= 1 << chance.randrange(8)
        else:
            spoiled[at : at + 8] = chance.choice(
                (
                    bytes(8),
                    b"\xff" * 8,
                    b"\0" * 7 + b"\x80",
                    chance.randbytes(8),
                    b"\0\0\0\0\1\0\0\0",
                )
            )
    return bytes(spoiled)


def spoil_folder(chance: random.Random, folder: Path) -> str:
    """One file of a Hugging Face folder. What was done."""
    if chance.random() < 0.25:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if chance.random() < 0.6:  # within the header's JSON, which stays JSON
            header = json.dumps(spoil_json(chance, json.loads(content[8 : 8 + length]))).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        else:
            file.write_bytes(spoil_bytes(chance, content))
        return file.name
    file = folder / chance.choices(JSON_FILES, (6, 1, 4, 1))[0]
    if chance.random() < 0.15:
        file.write_bytes(spoil_bytes(chance, file.read_bytes()))
    else:
        file.write_text(json.dumps(spoil_json(chance, json.loads(file.read_text()))))
    return file.name


def spoil_gguf(chance: random.Random, file: Path) -> str:
    """Its bytes, or what it says. What was done."""
    file.write_bytes(spoil_bytes(chance, file.read_bytes()))
    return file.name


def main() -> None:
    """Try so many, and tell of each that is not as it should be."""
    from tests.system.test_hostile_models import MAX_BYTES, MAX_SECONDS
    from tests.system.trial import Trials
    from tests.workers.tiny_models import CONFIGS, write_checkpoint, write_tokenizer

    first, count = int(sys.argv[1]), int(sys.argv[2])
    kind = sys.argv[3] if len(sys.argv) > 3 else "folder"
    seen: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Trials(dtype="float32") as trials:
        home = Path(name)
        sources: list[Path] = []
        spoil: Callable[[random.Random, Path], str]
        if kind == "gguf":
            spoil = spoil_gguf
            sources.append(write_gguf(home / "sound.gguf"))
        else:
            spoil = spoil_folder
            sources += [
                write_tokenizer(write_checkpoint(home / family, family)) for family in CONFIGS
            ]
        for seed in range(first, first + count):
            chance = random.Random(seed)
            source = sources[seed % len(sources)]
            target = home / f"model{source.suffix}"
            copied = (
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            )
            what = spoil(chance, Path(copied))
            outcome = trials.run(target, server_part=kind != "gguf")
            wrong = (
                outcome.problem
                or (outcome.message if outcome.message.startswith("internal") else "")
                or (f"{outcome.seconds:.1f} s" if outcome.seconds > MAX_SECONDS else "")
                or (f"{outcome.peak_bytes} bytes" if outcome.peak_bytes > MAX_BYTES else "")
            )
            seen[outcome.where or "served"] += 1
            if wrong:
                seen["WRONG"] += 1
                print(f"seed {seed} {source.name} {what}: {wrong}\n  {outcome}", flush=True)
                kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{seed}-")) / target.name
                shutil.copytree(target, kept) if target.is_dir() else shutil.copy(target, kept)
                print(f"  kept as {kept}", flush=True)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            if seed % 200 == 199:
                print(
                    f"{seed + 1 - first} {dict(seen)} {time.monotonic() - began:.0f} s", flush=True
                )
    print(dict(seen))


if __name__ == "__main__":
    main()
