"""The options of layer sharding, on instances of one rank."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.system.running_server import TIMEOUT_S, Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))


def text_of(server: Server) -> str:
    body = {"model": server.model, "prompt": "1, 2,", "max_tokens": 20, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_one_rank_serves_what_it_would_without(
    make_server: Callable[..., Server], tiny: Path
) -> None:
    plain = make_server(str(tiny), "--instances", "1")
    expected = text_of(plain)
    plain.stop()
    option = '{"layer_sharding": ["o_proj", "down_proj"]}'
    sharded = make_server(str(tiny), "--instances", "1", "--additional-config", option)
    assert text_of(sharded) == expected
    sharded.stop()


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
        (("--data-parallel-size", "2"), "--data-parallel-size is 2, and an instance has one rank"),
    ],
)
def test_what_can_not_be_is_said_in_a_line(
    make_server: Callable[..., Server], tiny: Path, arguments: tuple[str, ...], says: str
) -> None:
    server = make_server(str(tiny), "--instances", "1", *arguments, wait=False)
    assert server.process.wait(TIMEOUT_S) != 0
    assert says in server.log.read_text()
