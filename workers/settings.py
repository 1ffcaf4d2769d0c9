"""What a person can set of an instance, once from the command line to the engine.

Owns the name of each option, its bounds, its default and what it is for: the command line makes its
options of them, the server keeps them, and an instance is sent them as they are. Invariant: what
came from `checked`, or over a socket, is within its bounds. Imports no torch.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from workers.errors import InvalidSetting

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
KernelsName = Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "portable"]
WeightsName = Literal["auto", "packed", "bf16"]
KVCacheDtypeName = Literal["auto", "bf16", "int8", "int4"]
KERNELS: Final[tuple[str, ...]] = get_args(KernelsName)[1:]
MAX_NUM_SEQS: Final = 4096


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one instance. Lengths are in tokens, sizes in bytes. None: what the model or the machine
    makes of it."""

    max_model_len: (
        Annotated[
            int,
            Meta(
                ge=2,
                description="Longest prompt and answer together, in tokens. Default: the model's "
                "own.",
            ),
        ]
        | None
    ) = None
    max_num_seqs: Annotated[
        int,
        Meta(ge=1, le=MAX_NUM_SEQS, description="Sequences that run at once in one instance."),
    ] = 16
    max_num_batched_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="Prompt tokens that one step computes: more take in prompts faster, fewer "
            "hold up running streams less.",
        ),
    ] = 384
    attention_workspace: Annotated[
        int,
        Meta(
            ge=1 << 20,
            le=1 << 62,
            description="What attention may take for itself in a step, as 256MiB.",
        ),
    ] = 256 << 20
    num_speculative_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=16,
            description="Guess up to so many tokens ahead by looking up what the text has said "
            "before, and check them in one step. The text is the same.",
        ),
    ] = 0
    prefix_caching: Annotated[
        bool,
        Meta(description="Let instances find what any of them has computed of a common beginning."),
    ] = True
    cpu_kernels: Annotated[
        KernelsName,
        Meta(description=f"Instructions to use: {', '.join(KERNELS)}; auto: the best there are."),
    ] = "auto"
    dtype: Annotated[
        DtypeName,
        Meta(
            description="auto, bfloat16, float16 or float32. auto: the checkpoint's; GGUF: "
            "bfloat16."
        ),
    ] = "auto"
    weights: Annotated[
        WeightsName,
        Meta(
            description="What quantized weights are in memory: packed as they are, or bf16. auto: "
            "packed where the kernels compute on them."
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        KVCacheDtypeName,
        Meta(
            description="What keys and values are kept in: bf16, int8 or int4, 32 tokens quantized "
            "at a time. auto: as they are computed."
        ),
    ] = "auto"
    threads: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=1024,
                description="CPU threads of one instance. Default: those that compute share the "
                "cores.",
            ),
        ]
        | None
    ) = None
    device: Annotated[
        str,
        Meta(
            max_length=4096,
            description="Where the weights are: host, cuda:N or cuda:GPU-UUID.",
        ),
    ] = "host"
    offload: Annotated[
        str,
        Meta(
            pattern="^(auto|none|all|[0-9]{1,5})$",
            extra={"is": "auto, none, all or a number of layers"},
            description="Layers that are read from the checkpoint's files when they are computed, "
            "instead of staying in memory: none, all, a number of them, or auto, as few as "
            "--device-memory allows.",
        ),
    ] = "auto"
    offload_depth: Annotated[
        int,
        Meta(ge=1, le=64, description="Offloaded layers that are read ahead of the present one."),
    ] = 1
    device_memory: (
        Annotated[
            int,
            Meta(
                ge=1 << 20,
                le=1 << 62,
                description="What the weights may take of the device, those on their way included, "
                "as 2GiB. Default: what they need.",
            ),
        ]
        | None
    ) = None
    layer_sharding: Annotated[
        str,
        Meta(
            pattern=r"^([A-Za-z0-9_.]+(,[A-Za-z0-9_.]+)*)?$",
            max_length=4096,
            description="Linears of which each rank of an instance is to have its part of the "
            "layers only, as o_proj,q_b_proj. Ranks on one host have them all in common, once.",
        ),
    ] = ""
    additional_config: Annotated[
        str,
        Meta(
            max_length=1 << 16,
            description='The same as JSON, {"layer_sharding": ["o_proj", "q_b_proj"]}.',
        ),
    ] = ""
    tensor_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Processes that compute the model together in each instance, on views of "
            "the one copy of its weights.",
        ),
    ] = 1
    data_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Processes of each instance that divide the sequences of a step among "
            "them, each with the whole model.",
        ),
    ] = 1
    numa_nodes: Annotated[
        str,
        Meta(
            pattern="^(none|all|[0-9]{1,4}(,[0-9]{1,4})*)$",
            max_length=4096,
            extra={"is": "none, all, or numbers of nodes as 0,1"},
            description="NUMA nodes on which the ranks of an instance run, in turn: none, all, or "
            "as 0,1. A rank's threads and the memory of its own stay there.",
        ),
    ] = "none"
    map_files: Annotated[
        bool,
        Meta(
            description="Map safetensors that need no conversion instead of copying them: starts "
            "at once, but the files must not be changed meanwhile."
        ),
    ] = False

    @property
    def kv_bits(self) -> int:
        """Of a kept key's or value's element."""
        return {"int8": 8, "int4": 4}.get(self.kv_cache_dtype, 16)

    @property
    def num_ranks(self) -> int:
        """Processes of an instance."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def most_rows(self) -> int:
        """Of a step: prompt tokens, and of each sequence the token it goes on with and guesses."""
        return self.max_num_batched_tokens + self.max_num_seqs * (1 + self.num_speculative_tokens)

    @property
    def ranks_asked_by(self) -> str:
        """The option that asked for several."""
        name = "tensor" if self.tensor_parallel_size > 1 else "data"
        return f"--{name}-parallel-size"


def option(name: str) -> str:
    """As it is called on the command line."""
    return f"--{name.replace('_', '-')}"


def checked(given: Mapping[str, object]) -> EngineSettings:
    """The settings of these values, the others being as they are by default. Raises InvalidSetting,
    which names the option."""
    for name, value in given.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise InvalidSetting(f"{option(name)} is {value!r}, which is no UTF-8") from error
    try:
        return _consistent(msgspec.convert(given, EngineSettings))
    except msgspec.ValidationError as error:
        what, _, name = str(error).rpartition(" - at `$.")
        name = name.removesuffix("`")
        if name not in given:
            raise InvalidSetting(f"there is no such option: {error}") from error
        kind = get_type_hints(EngineSettings)[name]
        if get_origin(kind) is Literal:
            what = f"it is one of {', '.join(get_args(kind))}"
        elif said := _said_of(name):
            what = f"it is {said}"
        raise InvalidSetting(f"{option(name)} is {given[name]!r}: {what}") from error


def _said_of(name: str) -> str | None:
    """What a setting is, where its type does not say it to a person."""
    hint = get_type_hints(EngineSettings, include_extras=True)[name]
    metas = (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Meta))
    return next((one.extra["is"] for one in metas if one.extra), None)


def _check_nodes(settings: EngineSettings) -> None:
    """Raises InvalidSetting where there are more nodes than ranks to be on them."""
    asked, size = settings.numa_nodes, settings.num_ranks
    if asked == "all" and size == 1:
        raise InvalidSetting(
            "--numa-nodes is all, and each instance is one rank, which is on one node: give it as "
            "many as there are nodes (--tensor-parallel-size), or name its node"
        )
    if asked not in ("none", "all") and len(asked.split(",")) > size:
        raise InvalidSetting(
            f"--numa-nodes is {asked}, and each instance has {size} rank{'s' * (size > 1)}, each "
            "on one node: name fewer, or give a larger --tensor-parallel-size"
        )


def _check_ranks(settings: EngineSettings) -> None:
    """What several ranks can't do. Raises InvalidSetting."""
    size, asked = settings.num_ranks, settings.ranks_asked_by
    if settings.tensor_parallel_size > 1 and settings.data_parallel_size > 1:
        raise InvalidSetting(
            f"--tensor-parallel-size is {settings.tensor_parallel_size}, and --data-parallel-size "
            f"is {settings.data_parallel_size}: give one of them, and more --instances"
        )
    if not settings.device.startswith("host"):
        raise InvalidSetting(
            f"{asked} is {size}, and --device is {settings.device}: ranks sum in the host's "
            "memory, so leave out one of them"
        )
    sharding = settings.layer_sharding or settings.additional_config
    if sharding and settings.tensor_parallel_size > 1:
        raise InvalidSetting(
            f"{asked} is {size}, and its ranks have their own parts of all linears: leave out "
            "--layer-sharding"
        )
    if settings.offload not in ("auto", "none", "0"):
        raise InvalidSetting(
            f"{asked} is {size}, and --offload is {settings.offload}: layers that are read as they "
            "are computed are one rank's, so leave out one of them"
        )


def _check_kept(settings: EngineSettings) -> None:
    """What can't be computed with quantized keys and values. Raises InvalidSetting."""
    asked = f"--kv-cache-dtype is {settings.kv_cache_dtype}"
    if not settings.device.startswith("host"):
        raise InvalidSetting(
            f"{asked}, and --device is {settings.device}: they are quantized on the processor "
            "alone, so leave out one of them"
        )
    if settings.dtype in ("float16", "float32"):
        raise InvalidSetting(
            f"{asked}, and --dtype is {settings.dtype}: the kernels that read them compute in "
            "bfloat16, so leave out one of them"
        )
    if settings.num_ranks > 1:
        raise InvalidSetting(
            f"{asked}, and {settings.ranks_asked_by} is {settings.num_ranks}: ranks keep keys and "
            "values as they are computed, so leave out one of them"
        )


class _AdditionalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    layer_sharding: tuple[str, ...] = ()


def _consistent(settings: EngineSettings) -> EngineSettings:
    """With `layer_sharding` wherever it was given. Raises InvalidSetting."""
    if settings.num_ranks > 1:
        _check_ranks(settings)
    if settings.kv_bits < 16:
        _check_kept(settings)
    _check_nodes(settings)
    if not settings.additional_config:
        return settings
    try:
        additional = msgspec.json.decode(settings.additional_config, type=_AdditionalConfig)
        names = ",".join(additional.layer_sharding)
        folded = msgspec.structs.replace(settings, layer_sharding=names)
        folded = msgspec.convert(msgspec.structs.asdict(folded), EngineSettings)
    except msgspec.DecodeError as error:
        raise InvalidSetting(
            f"--additional-config is {settings.additional_config!r}: {error}; it is as "
            '{"layer_sharding": ["o_proj"]}'
        ) from error
    if settings.layer_sharding not in ("", names):
        raise InvalidSetting(
            f"--layer-sharding is {settings.layer_sharding}, and --additional-config says {names}: "
            "give one of them"
        )
    return folded
