"""The engine's settings hold to their bounds wherever they come from."""

import msgspec
import pytest

from workers import EngineSettings, InvalidSetting, checked
from workers.messages import InstanceSpec, Start, decode_start, encode
from workers.model.native import SETS
from workers.settings import KERNELS


def spec_of(settings: EngineSettings) -> InstanceSpec:
    return InstanceSpec(
        name="i0",
        runtime_dir="/run",
        engines="ipc:///run/engines.sock",
        server_pid=1,
        model="/models/x",
        served_model_name="x",
        requested_at=0.0,
        settings=settings,
        num_threads=1,
    )


def test_there_is_a_name_for_each_set_of_kernels() -> None:
    assert KERNELS == SETS


def test_they_reach_an_instance_as_they_are() -> None:
    told = checked({"max_num_batched_tokens": 7, "dtype": "bfloat16", "threads": 3})
    assert decode_start(encode(Start(spec=spec_of(told)))).spec.settings == told


def test_what_came_over_a_socket_is_within_bounds() -> None:
    frame = encode(Start(spec=spec_of(EngineSettings(max_num_seqs=0))))
    with pytest.raises(msgspec.ValidationError, match="max_num_seqs"):
        decode_start(frame)


def test_a_problem_names_the_option_and_what_it_may_be() -> None:
    with pytest.raises(InvalidSetting, match="--dtype is 'int3': it is one of auto, bfloat16"):
        checked({"dtype": "int3"})
    with pytest.raises(InvalidSetting, match=r"--max-num-seqs is 0: .*>= 1"):
        checked({"max_num_seqs": 0})
    with pytest.raises(InvalidSetting, match="no_such_option"):
        checked({"no_such_option": 3})


def test_series_may_be_named_in_either_way() -> None:
    assert checked({"layer_sharding": "o_proj,q_b_proj"}).layer_sharding == "o_proj,q_b_proj"
    given = {"additional_config": '{"layer_sharding": ["o_proj", "q_b_proj"]}'}
    assert checked(given).layer_sharding == "o_proj,q_b_proj"
    assert checked({**given, "layer_sharding": "o_proj,q_b_proj"}) == checked(given)
    with pytest.raises(InvalidSetting, match="additional-config says o_proj,q_b_proj: give one"):
        checked({**given, "layer_sharding": "o_proj"})


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layer_sharding": "o_proj"}', '{"layer_sharding": ["o;"]}', '{"x": 1}']
)
def test_additional_configuration_is_what_it_may_be(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"--additional-config is .*layer_sharding.*o_proj"):
        checked({"additional_config": text})


def test_ranks_divide_the_model_or_the_sequences() -> None:
    assert checked({}).num_ranks == 1
    assert checked({"data_parallel_size": 3}).num_ranks == 3
    assert checked({"data_parallel_size": 3, "layer_sharding": "o_proj"}).num_ranks == 3
    assert checked({"tensor_parallel_size": 4}).num_ranks == 4
    with pytest.raises(InvalidSetting, match="--data-parallel-size is 3: give one of them"):
        checked({"tensor_parallel_size": 2, "data_parallel_size": 3})
    with pytest.raises(InvalidSetting, match="--data-parallel-size is 2, and --offload is all"):
        checked({"data_parallel_size": 2, "offload": "all"})


def test_quantized_keys_and_values_are_refused_where_nobody_computes_them() -> None:
    names = ("auto", "bf16", "int8", "int4")
    assert [checked({"kv_cache_dtype": name}).kv_bits for name in names] == [16, 16, 8, 4]
    assert checked({"kv_cache_dtype": "int4", "dtype": "bfloat16", "offload": "all"}).kv_bits == 4
    with pytest.raises(InvalidSetting, match="--kv-cache-dtype is 'fp8': it is one of auto, bf16"):
        checked({"kv_cache_dtype": "fp8"})
    for other, match in (
        ({"device": "cuda:0"}, "--device is cuda:0: they are quantized on the processor alone"),
        ({"dtype": "float32"}, "--dtype is float32: the kernels .* compute in bfloat16"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2: ranks keep"),
        ({"data_parallel_size": 3}, "--data-parallel-size is 3: ranks keep"),
    ):
        checked({"kv_cache_dtype": "bf16", **other})
        with pytest.raises(InvalidSetting, match=f"--kv-cache-dtype is int8, and {match}"):
            checked({"kv_cache_dtype": "int8", **other})
