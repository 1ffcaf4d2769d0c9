"""What a model will take, read from its headers: `python -m workers.estimate MODEL …`.

Owns the way from a checkpoint that nobody has loaded to an `Estimate`. Invariants: no weight is
read and no memory of the model's size is touched; weights and KV cache are counted by the code
that will later lay out, bind and cache them (`make_plan`, `build_model`, `KVLayout`), so that the
figures can't disagree. Does not know instances or machines: how often one counts is the server's
business.

Standard output holds one JSON document. A model that can't be served is one line on standard error
that names the fix, and exit status 1.

    split over K devices, by transformers' own plan for the architecture (`base_model_tp_plan`):

    by columns   weight [out / K, in], bias [out / K]       query, key, value, gate, up projections
    by rows      weight [out, in / K], bias whole           output and down projections
    replicated   whole on every rank                        norms, embeddings, the output head
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch

from workers.checkpoint import Checkpoint, metadata_of
from workers.checkpoint.formats.checkpoint import SourceTensor
from workers.checkpoint.offloaded import KEY as OFFLOADED
from workers.checkpoint.plan import make_plan
from workers.config.encoder_settings import task_of
from workers.errors import InvalidSetting, ReadFailed, UnsupportedCheckpoint, WorkerError
from workers.kv.layout import KVLayer, KVLayout
from workers.messages import Estimate, OffloadEstimate, RankEstimate
from workers.model.attention import DEFAULT_WORKSPACE_BYTES
from workers.model.decoder import Model, build_model
from workers.model.encoder_estimate import embedding_estimate
from workers.model.geometry import geometry_of
from workers.model.tensor_parallel import narrow
from workers.packed_format import PackedFormat, decoded
from workers.placement.choice import Proposal, largest_slot_bytes, propose
from workers.placement.forecast import memory_bytes_per_s, read_bytes_per_s
from workers.placement.kept import check_kept
from workers.placement.packing import open_as_served
from workers.placement.rank_sums import sums_bytes
from workers.placement.resident import Resident
from workers.settings import EngineSettings, checked
from workers.skeleton.decoder import skeleton
from workers.skeleton.packed import weight_shapes
from workers.weight_format import float_dtype

Part = Literal["column", "row", "replicated"]

_PARTS: Final[Mapping[str, Part]] = {
    "colwise": "column",
    "colwise_rep": "column",
    "colwise_gather_output": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
    # What follows holds whole tensors, or says only how a module is called.
    "all_reduce": "replicated",
    "embedding_colwise": "replicated",
    "embedding_rowwise": "replicated",
    "local_params": "replicated",
    "mla_kv_a_proj": "replicated",
    "moe_identity_expert": "replicated",
    "moe_tp_experts": "replicated",
    "replicate": "replicated",
    "replicated_with_grad_allreduce": "replicated",
    "sequence_parallel": "replicated",
}
"""transformers' styles (5.23, distributed/tensor_parallel.py). Embeddings and the output head could
be split as well, but a lookup and a choice of tokens would then need all ranks: they are not."""


def main() -> int:
    """Print the estimate, or one line of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m workers.estimate")
    parser.add_argument("model")
    parser.add_argument("--settings", default="{}", help="Of an instance, as JSON.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    try:
        settings = checked(json.loads(arguments.settings))
        found = estimate(open_as_served(arguments.model, settings), settings)
    except WorkerError as error:
        return _failed(str(error))
    except Exception as error:  # noqa: BLE001
        # The architectures are not our code: whatever building one raises is shown to a person.
        return _failed(f"{arguments.model} can't be laid out: {type(error).__name__}: {error}")
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0


def estimate(
    checkpoint: Checkpoint,
    settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
) -> Estimate:
    """All figures of `checkpoint`, opened as these settings say, for one instance.

    Raises CheckpointError as loading it would, and InvalidSetting where the model is shorter than
    `max_model_len` or has less to divide than `tensor_parallel_size` ranks.
    """
    tensors = checkpoint.tensors()
    metadata = metadata_of(checkpoint)
    shapes = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in tensors}
    dtype = checkpoint.dtype or float_dtype(shapes)
    size = settings.tensor_parallel_size
    if task_of(metadata) == "embed":
        if settings.num_ranks > 1:
            asked = settings.ranks_asked_by
            raise InvalidSetting(f"a model that embeds has one rank: leave out {asked}")
        return embedding_estimate(
            metadata, tensors, dtype, settings.max_model_len, settings.max_num_batched_tokens
        )
    check_kept(checkpoint, settings)
    model = build_model(
        json.loads(metadata["config"]),
        Resident(shapes),
        dtype,
        packed=decoded(metadata),
        kv_bits=settings.kv_bits,
    )
    limit = model.geometry.max_model_len
    max_model_len = settings.max_model_len or limit
    if max_model_len > limit:
        raise InvalidSetting(
            f"--max-model-len is {max_model_len}, but this model was made for {limit} tokens"
        )
    layout = model.geometry.kv_layout
    proposal = propose(checkpoint, settings)
    if proposal is not None:
        gone = proposal.layers.names
        tensors = [one for one in tensors if one.name not in gone]
        metadata = {**metadata, OFFLOADED: proposal.layers.encoded()}
    rank = None
    if size > 1:
        rank = _rank(model, tensors, metadata, max_model_len, size)
        layout = _layout_of_ranks(metadata, dtype, size)
    try:
        slot_bytes, stays_because = largest_slot_bytes(checkpoint, settings), ""
    except InvalidSetting as reason:
        slot_bytes, stays_because = 0, str(reason)
    prompt_tokens = min(settings.max_num_batched_tokens, max_model_len)
    return Estimate(
        architecture=model.geometry.architecture,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(math.prod(shape) for shape in weight_shapes(model.module).values()),
        num_tensors=len(shapes),
        max_model_len=max_model_len,
        segment_bytes=make_plan(tensors, metadata).segment_bytes,
        kv_bytes_per_token=layout.bytes_per_token,
        kv_bytes_per_sequence=layout.num_bytes(max_model_len),
        prefill_bytes=_prefill_bytes(model, prompt_tokens, max_model_len),
        logits_bytes_per_sequence=model.geometry.vocab_size * (dtype.itemsize + 16),
        sums_bytes=sums_bytes(settings, model.module),
        slot_bytes=slot_bytes,
        stays_because=stays_because,
        rank=rank,
        offload=None if proposal is None else _offload(checkpoint, proposal),
    )


def _offload(checkpoint: Checkpoint, proposal: Proposal) -> OffloadEstimate:
    files = {run.file for one in checkpoint.tensors() for run in checkpoint.stored_runs(one.name)}
    if not files and checkpoint.path.is_file():  # converted, from there to a file beside it
        files = {checkpoint.path}
    return OffloadEstimate(
        num_layers=proposal.num_layers,
        num_offloaded=len(proposal.layers.layers),
        slots_bytes=proposal.slots_bytes,
        pass_bytes=proposal.pass_bytes,
        read_bytes_per_s=_measured(sorted(files)) if files else 0,
        memory_bytes_per_s=memory_bytes_per_s(),
    )


def _measured(files: list[Path]) -> int:
    try:
        return read_bytes_per_s(files)
    except (OSError, ReadFailed):
        return 0  # whoever serves it will be told


def _prefill_bytes(model: Model, num_tokens: int, max_model_len: int) -> int:
    """What a step of `num_tokens` prompt tokens keeps at its height: four rows a token of the
    residual stream's width and three of the widest layer's; of attention, as far as its workspace
    allows, one layer's keys and values, the mask, a byte and a float for each pair of query and
    key, and two copies of soft-capped scores. Within a fifth of what seven random
    Llamas and three Gemmas 2 were seen to take (hidden sizes of 576 to 2,048, contexts of 1,024 and
    4,096 tokens), once 10 MB are added for the heap's own growth."""
    config = _config(model)
    widths = [
        shape[-2]
        for shape in weight_shapes(model.module).values()
        if len(shape) > 1 and shape[-2] != config.vocab_size
    ]
    layout = model.geometry.kv_layout
    itemsize = layout.dtype.itemsize
    rows = num_tokens * (4 * int(config.hidden_size) + 3 * max(widths, default=0)) * itemsize
    pairs = num_tokens * max_model_len
    copied = max(2 * layer.num_heads * layer.head_dim for layer in layout.layers)
    attention = pairs * 5 + max_model_len * copied * itemsize
    if getattr(config, "attn_logit_softcapping", None) is not None:
        attention += 2 * int(config.num_attention_heads) * pairs * 4
    return rows + min(attention, DEFAULT_WORKSPACE_BYTES)


# --- tensor parallelism


def _layout_of_ranks(metadata: Mapping[str, str], dtype: torch.dtype, size: int) -> KVLayout:
    """Of keys and values where `size` ranks on one host compute the model. Raises as serving it so
    would: UnsupportedCheckpoint, InvalidSetting."""
    module = skeleton(json.loads(metadata["config"]), dtype)
    shard = narrow(module, 0, size, decoded(metadata))
    return geometry_of(module, dtype, torch.device("cpu"), (), shard).kv_layout


def _rank(
    model: Model,
    tensors: Sequence[SourceTensor],
    metadata: Mapping[str, str],
    max_model_len: int,
    size: int,
) -> RankEstimate | None:
    """One of `size` ranks, all of which hold the same number of bytes; None where they would not.
    On one host they need not: there they view one copy."""
    parts = {one.name: _part(model, one) for one in tensors}
    if set(parts.values()) == {"replicated"}:
        raise UnsupportedCheckpoint(
            f"base_model_tp_plan of {type(_config(model)).__name__} names none of the model's "
            "tensors: only --tensor-parallel-size 1 is possible"
        )
    if not _divides(model, tensors, parts, size, decoded(metadata)):
        return None
    own = [
        dataclasses.replace(one, shape=_shard(one.shape, parts[one.name], size)) for one in tensors
    ]

    def num_bytes(part: Part) -> int:
        return sum(one.num_bytes for one in own if parts[one.name] == part)

    layout = model.geometry.kv_layout
    layers = tuple(KVLayer(one.num_heads // size, one.head_dim) for one in layout.layers)
    rank_layout = KVLayout(layers, layout.dtype)
    return RankEstimate(
        column_bytes=num_bytes("column"),
        row_bytes=num_bytes("row"),
        replicated_bytes=num_bytes("replicated"),
        segment_bytes=make_plan(own, metadata).segment_bytes,
        kv_bytes_per_token=rank_layout.bytes_per_token,
        kv_bytes_per_sequence=rank_layout.num_bytes(max_model_len),
    )


def _part(model: Model, tensor: SourceTensor) -> Part:
    """How a tensor is split, by its own entry of the plan or its module's, as transformers looks it
    up. Raises UnsupportedCheckpoint for an architecture without a plan, and for unknown styles."""
    config = _config(model)
    plan: Mapping[str, str] | None = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedCheckpoint(
            f"{type(config).__name__} ({config.model_type}) has no base_model_tp_plan in "
            "transformers, so nobody says how to split it: only --tensor-parallel-size 1 is "
            "possible"
        )
    prefix = f"{model.module.base_model_prefix}."
    name = ".".join(
        "*" if step.isdecimal() else step for step in tensor.name.removeprefix(prefix).split(".")
    )
    style = plan.get(name) or plan.get(name.rpartition(".")[0], "replicate")
    if style not in _PARTS:
        raise UnsupportedCheckpoint(
            f"base_model_tp_plan of {type(config).__name__} splits {name} by {style!r}, which is "
            "not known here: only --tensor-parallel-size 1 is possible"
        )
    part = _PARTS[style]
    return "replicated" if part == "row" and len(tensor.shape) < 2 else part


def _split_dimension(shape: Sequence[int], part: Part) -> int | None:
    """Counted from the last one, since expert weights have a dimension more in front."""
    if part == "replicated" or not shape:
        return None
    return -1 if part == "row" or len(shape) == 1 else -2


def _shard(shape: tuple[int, ...], part: Part, size: int) -> tuple[int, ...]:
    dimension = _split_dimension(shape, part)
    if dimension is None:
        return shape
    sizes = list(shape)
    sizes[dimension] //= size
    return tuple(sizes)


def _divides(
    model: Model,
    tensors: Sequence[SourceTensor],
    parts: Mapping[str, Part],
    size: int,
    packed: Mapping[str, PackedFormat],
) -> bool:
    """Whether a rank holds whole heads, and as many inputs or outputs of a layer as every other
    rank; of packed ones, whole strips or tiles."""
    lengths = [int(_config(model).num_attention_heads)]
    lengths += [layer.num_heads for layer in model.geometry.kv_layout.layers]
    for one in tensors:
        dimension = _split_dimension(one.shape, parts[one.name])
        if dimension is None:
            continue
        layout = packed.get(one.name)
        of_tile = layout.tile_bytes if layout is not None and parts[one.name] == "row" else 1
        lengths.append(one.shape[dimension] // of_tile)
    return not any(length % size for length in lengths)


def _config(model: Model) -> Any:
    """The architecture's config, of a class of `transformers`."""
    return model.module.config


def _failed(message: str) -> int:
    """One line, whatever the message holds."""
    sys.stderr.write(" ".join(message.split()) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
