"""Which layers a checkpoint's settings offload, and which settings go together."""

from pathlib import Path
from typing import Any

import pytest

from tests.workers.tiny_models import write_checkpoint
from workers.checkpoint import open_checkpoint
from workers.errors import InvalidSetting
from workers.placement.choice import propose
from workers.settings import checked

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_checkpoint(folder, "llama", num_hidden_layers=6, intermediate_size=2048)


def test_as_many_layers_as_were_asked_for(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for asked, num_layers in (("all", 6), ("4", 4)):
        proposal = propose(checkpoint, checked({"offload": asked}))
        assert proposal is not None
        assert (len(proposal.layers.layers), proposal.num_layers) == (num_layers, 6)
    assert propose(checkpoint, checked({"offload": "none"})) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"offload": "7"}, "--offload is 7, but there are 6 layers that can be"),
        ({"offload": "all", "map_files": True}, "--map-files leaves to the kernel"),
        (
            {"device_memory": MIB, "tensor_parallel_size": 2},
            "by one rank: leave out --device-memory or",
        ),
        ({"offload": "all", "device": "cuda:0"}, "a model on a GPU must fit there"),
        ({"device_memory": MIB}, "with --offload all"),
        ({"offload": "none", "device_memory": MIB}, "leave --offload to auto"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    tiny: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidSetting, match=says):
        propose(open_checkpoint(tiny), checked(settings))
