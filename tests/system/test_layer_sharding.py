"""The options of layer sharding, on instances of one rank and of several that divide sequences."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.system.running_server import TIMEOUT_S, Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))


def texts_of(server: Server) -> list[str]:
    """Greedy, of several prompts at once."""
    body = {"model": server.model, "prompt": ["1, 2,", "a", "x y z"], "max_tokens": 20}
    body |= {"temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_any_number_of_ranks_serves_what_one_would_without(
    make_server: Callable[..., Server], tiny: Path
) -> None:
    plain = make_server(str(tiny), "--instances", "1")
    expected = texts_of(plain)
    plain.stop()
    option = '{"layer_sharding": ["o_proj", "down_proj"]}'
    one = make_server(str(tiny), "--instances", "1", "--additional-config", option)
    assert texts_of(one) == expected
    one.stop()
    sizes = ("--instances", "1", "--data-parallel-size", "3")
    several = make_server(str(tiny), *sizes, "--additional-config", option)
    assert texts_of(several) == expected
    [instance] = several.remember()["instances"]
    assert len(instance["rank_pids"]) == 2
    proven = several.onecopy("verify", "--json")
    assert proven.status == 0, proven.stdout
    assert len(json.loads(proven.stdout)["instances"]) == 3
    os.kill(instance["rank_pids"][1], signal.SIGKILL)
    several.wait_instances(
        lambda found: (
            [one["state"] for one in found] == ["ready"] and found[0]["pid"] != instance["pid"]
        ),
        "another instance",
    )
    assert texts_of(several) == expected
    several.stop()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--layer-sharding", "o_proj,q_b_proj"),
            "--layer-sharding: q_b_proj is no linear of this model's layers: there are down_proj, "
            "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (("--layer-sharding", "o_proj;"), "--layer-sharding is 'o_proj;'"),
        (("--additional-config", "[1]"), "--additional-config is '[1]': Expected `object`"),
        (("--additional-config", '{"ascend": 1}'), "unknown field `ascend`"),
        (("--additional-config", '{"layer_sharding": ["o proj"]}'), "--additional-config is"),
        (
            ("--layer-sharding", "o_proj", "--additional-config", '{"layer_sharding": ["q"]}'),
            "--layer-sharding is o_proj, and --additional-config says q",
        ),
    ],
)
def test_what_can_not_be_is_said_in_a_line(
    make_server: Callable[..., Server], tiny: Path, arguments: tuple[str, ...], says: str
) -> None:
    server = make_server(str(tiny), "--instances", "1", *arguments, wait=False)
    assert server.process.wait(TIMEOUT_S) != 0
    assert says in server.log.read_text()
