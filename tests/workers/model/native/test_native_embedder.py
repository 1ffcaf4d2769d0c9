"""Hidden states by the native kernels against transformers' own, family by family."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from tests.workers.model.tiny_embedders import MAX_POSITIONS, config_of, hidden_states, texts
from tests.workers.model.tiny_embedders import reference_model as reference
from workers.config.encoder_settings import EmbeddingSettings
from workers.model.encoder import EmbeddingModel
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import NativeDecoder, supports
from workers.model.native.embedder import NativeEmbedder

pytestmark = pytest.mark.usefixtures("kernels")

ODD: dict[str, Any] = {"hidden_size": 100, "num_attention_heads": 5, "intermediate_size": 77}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert odd": ODD,
    "roberta": {},
    "xlm-roberta": {},
    "camembert odd": ODD,
    "distilbert": {},
    "distilbert odd": {"dim": 100, "n_heads": 5, "hidden_dim": 77},
    "nomic_bert": {},
    "nomic_bert odd": {**ODD, "head_dim": 20},
    "qwen3": {},
    "electra": {"embedding_size": 32},
}
LENGTHS = (3, 17, 1, MAX_POSITIONS, 40, 16)


def models_of(family: str) -> tuple[Any, Any]:
    """In bf16, and the same weights in fp32."""
    name, changes = family.partition(" ")[0], FAMILIES[family]
    module = reference(name, dtype=torch.bfloat16, **changes)
    exact = reference(name, **changes)
    exact.load_state_dict(module.state_dict())
    for one in (module, exact):
        if hasattr(one, "pooler"):
            one.pooler = None  # as the models that are served are built
    return module, exact


@dataclass(frozen=True)
class Known:
    """What transformers makes of some texts, and how far that is off."""

    module: Any
    inputs: list[list[int]]
    right: list[torch.Tensor]
    off: list[torch.Tensor]


@cache
def known(family: str) -> Known:
    """The same for all sets of kernels."""
    module, exact = models_of(family)
    inputs = texts(*LENGTHS)
    right = [hidden_states(exact, one) for one in inputs]
    off = [hidden_states(module, one).float() - r for one, r in zip(inputs, right, strict=True)]
    return Known(module, inputs, right, off)


def root_mean_square(errors: list[torch.Tensor]) -> float:
    return float(torch.cat(errors).square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_as_good_as_those_of_transformers(family: str) -> None:
    theirs = known(family)
    assert supports(theirs.module, torch.bfloat16) is None
    inputs = theirs.inputs
    embedder = NativeEmbedder(theirs.module, 200, MAX_POSITIONS, 2)
    ours = embedder.forward(inputs)
    off = [one.float() - right for one, right in zip(ours, theirs.right, strict=True)]
    assert root_mean_square(off) <= 1.2 * root_mean_square(theirs.off)
    for number, one in enumerate(inputs):  # in any company, by any number of threads
        assert torch.equal(embedder.forward([one], 1)[0], ours[number])
    reverse = embedder.forward(inputs[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(reverse, ours, strict=True))


def test_a_padding_token_within_a_text_is_left_to_transformers() -> None:
    """RoBERTa's positions don't count it."""
    module, _ = models_of("roberta")
    model = EmbeddingModel(module, EmbeddingSettings("mean"))
    assert model.accelerate(200, MAX_POSITIONS, 1) is None
    with_padding, without = [5, config_of("roberta")["pad_token_id"], 7], [5, 6, 7]
    for one in (with_padding, without):
        theirs = hidden_states(module, one).float().mean(dim=0)
        torch.testing.assert_close(model.forward([one])[0], theirs, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_each_pooling_is_that_of_the_padded_way(pooling: Any) -> None:
    module, _ = models_of("bert")
    inputs = texts(*LENGTHS)
    padded = EmbeddingModel(module, EmbeddingSettings(pooling))
    model = EmbeddingModel(module, EmbeddingSettings(pooling))
    assert model.accelerate(200, MAX_POSITIONS, 2) is None
    assert padded.pads
    assert not model.pads
    torch.testing.assert_close(model.forward(inputs), padded.forward(inputs), atol=0.06, rtol=0.03)


def test_what_is_not_computed_is_said() -> None:
    for family, words in (("mpnet", "MPNet"), ("electra", "laid out"), ("gemma3_text", "causal")):
        assert words in str(supports(reference(family, dtype=torch.bfloat16), torch.bfloat16))
    module, _ = models_of("bert")
    with pytest.raises(NotNative, match=f"no more than {MAX_POSITIONS} positions"):
        NativeEmbedder(module, 200, MAX_POSITIONS + 1, 1)
    with pytest.raises(ValueError, match="at most 8"):
        NativeEmbedder(module, 8, 8, 1).forward([[1] * 9])


def test_rows_of_a_text_come_together() -> None:
    module, _ = models_of("bert")
    embedder = NativeEmbedder(module, 8, MAX_POSITIONS, 1)
    decoder: NativeDecoder = embedder._decoder
    for positions, tables in (([1, 2], [0, 0]), ([0, 0, 1], [0, 1, 0]), ([0, 2], [0, 0])):
        with pytest.raises(ValueError, match="come together"):
            decoder.forward(
                *(
                    torch.tensor(one, dtype=torch.int32).numpy()
                    for one in (tables, positions, tables)
                ),
                embedder._blocks(torch.tensor([1, 1]).numpy()),
                torch.empty(0, dtype=torch.int32).numpy(),
                hidden=torch.empty(len(tables), decoder.hidden_stride, dtype=torch.bfloat16),
            )
