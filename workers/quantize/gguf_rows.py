"""Which rows of a GGUF file make up each parameter, told to a process without torch: `python -m
workers.quantize.gguf_rows FILE`.

Owns the form in which it is told. Invariants: no tensor's data is read but what the config is made
of; an order of rows that many tensors have is told once. Standard output holds one JSON document;
a file that can't be read is one line on standard error, and exit status 1.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np


class StoredRows(msgspec.Struct, frozen=True):
    """A tensor of the file: rows of `row_length` elements, `row_bytes` each."""

    file: str
    offset: int
    kind: int
    row_length: int
    row_bytes: int


class Rows(msgspec.Struct, frozen=True):
    """Rows of a tensor, from `begin` on, `count` of them, in the order of that number, or as they
    are where it is -1: an order says for each row of the parameter which one it is."""

    tensor: int
    begin: int
    count: int
    order: int


class Described(msgspec.Struct, frozen=True):
    """A parameter. Of one that is a vector each element is a row; one whose rows are scattered, or
    that is transposed, has none that could be read."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    subtract: float = 0.0
    constant: float | None = None


class GGUFRows(msgspec.Struct, frozen=True):
    """All of it."""

    config: dict[str, object]
    tensors: list[StoredRows]
    orders: list[list[int]]
    parameters: list[Described]


def describe(path: Path) -> GGUFRows:
    """Raises CheckpointError."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from workers.checkpoint.formats.gguf import GGUFCheckpoint

    header, config, parameters = GGUFCheckpoint(path, torch.bfloat16).rows()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[config["model_type"]]]
    numbers: dict[str, int] = {}
    tensors: list[StoredRows] = []
    for name, one in header.tensors.items():
        numbers[name] = len(tensors)
        length = int(one.shape[0])
        count = int(one.n_elements) // length
        tensors.append(
            StoredRows(
                *(str(header.file_of[name]), int(one.data_offset), int(one.tensor_type)),
                *(length, int(one.n_bytes) // count),
            )
        )
    orders: dict[bytes, int] = {}
    described = []
    for parameter in parameters:
        rows: list[Rows] = []
        first = 0
        for piece in parameter.pieces:
            to = np.asarray(piece.rows, np.int64) - first
            if parameter.transposed or sorted(to) != list(range(len(to))):
                rows = []
                break
            order = -1
            if (np.diff(to) != 1).any():
                inverse = np.argsort(to).astype(np.int64)
                order = orders.setdefault(inverse.tobytes(), len(orders))
            rows.append(Rows(numbers[piece.tensor], piece.begin, len(to), order))
            first += len(to)
        described.append(
            Described(
                *(parameter.name, parameter.shape, tuple(rows)),
                *(parameter.subtract, parameter.constant),
            )
        )
    return GGUFRows(
        config={"architectures": [model_class.__name__], "dtype": "bfloat16", **config},
        tensors=tensors,
        orders=[np.frombuffer(one, np.int64).tolist() for one in orders],
        parameters=described,
    )


def main() -> int:
    """Print it, or one line of what is wrong."""
    from workers.errors import WorkerError

    try:
        found = describe(Path(sys.argv[1]))
    except WorkerError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
