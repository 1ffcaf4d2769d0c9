"""Every setting is an option of `onecopy serve`, under one name and within its own bounds."""

import inspect
import re
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from allocator import AllocatorError
from server.cli.cli import app
from server.cli.setting_options import (
    Options,
    engine_settings,
    option,
    settings,
    takes_settings,
)
from server.settings import Settings
from workers import EngineSettings, InvalidSetting, checked

KNOWN = {"model": "/m", "served_model_name": "m", "runtime_dir": "/r"}


def serve_options() -> dict[str, Any]:
    command = typer.main.get_command(app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    return {name: one for one in serve.params for name in one.opts}


def given(**changes: Any) -> dict[str, Any]:
    """As the command line would hand them over, with its own defaults."""

    @takes_settings()
    def command(options: Options) -> None: ...

    signature = inspect.signature(command)
    return {name: one.default for name, one in signature.parameters.items()} | changes


def test_each_setting_is_an_option() -> None:
    options = serve_options()
    described = {name for name, field in Settings.model_fields.items() if field.description}
    for name in (*described, *EngineSettings.__struct_fields__):
        assert options[option(name)].help, name


def test_what_is_not_given_is_as_the_settings_say() -> None:
    assert settings(given(), **KNOWN) == Settings(**KNOWN)  # type: ignore[arg-type]


def test_values_arrive_under_one_name() -> None:
    told = settings(
        given(
            num_instances=3,
            allowed_hosts=["a", "b"],
            memory_limit="2GiB",
            max_num_batched_tokens=7,
            attention_workspace="2MiB",
            prefix_caching=False,
        ),
        **KNOWN,
    )
    assert (told.num_instances, told.allowed_hosts, told.memory_limit) == (3, ("a", "b"), 2 << 30)
    assert told.engine == EngineSettings(
        max_num_batched_tokens=7, attention_workspace=2 << 20, prefix_caching=False
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 1),
        ("max_num_seqs", 4097),
        ("max_num_batched_tokens", 0),
        ("attention_workspace", "1k"),
        ("num_speculative_tokens", 17),
        ("cpu_kernels", "sse"),
        ("dtype", "int3"),
        ("threads", 0),
        ("device", "\udcff"),
    ],
)
def test_what_an_engine_can_not_be_told_names_its_option(name: str, value: object) -> None:
    with pytest.raises(InvalidSetting, match=f"^{option(name)} is "):
        engine_settings(given(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_instances", 257, ValidationError),
        ("port", -1, ValidationError),
        ("prefix_cache_salt", "sea", ValidationError),
        ("memory_limit", "much", AllocatorError),
    ],
)
def test_nor_a_server(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        settings(given(**{name: value}), **KNOWN)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--instances", "257"),
        ("--port", "65536"),
        ("--drain-timeout", "0"),
        ("--max-num-seqs", "4097"),
        ("--max-model-len", "1"),
        ("--threads", "0"),
    ],
)
def test_a_number_out_of_bounds_is_refused_at_once(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["serve", "/no/such/model", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("device", "cuda:0", "ranks sum in the host's memory"),
        ("layer_sharding", "o_proj", "leave out --layer-sharding"),
        ("additional_config", '{"layer_sharding": ["o_proj"]}', "leave out --layer-sharding"),
        ("data_parallel_size", 2, "give one of them"),
        ("offload", "all", "--offload is all: layers that are read"),
        ("tensor_parallel_size", 65, "--tensor-parallel-size is 65"),
    ],
)
def test_what_several_ranks_can_not_do_is_refused_by_name(
    name: str, value: object, says: str
) -> None:
    with pytest.raises(InvalidSetting, match=re.escape(says)):
        checked({"tensor_parallel_size": 2, name: value})
