"""Vectors against transformers' own forward pass, family by family; what files say of pooling; what
is refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModel

from tests.workers.model.tiny_embedders import (
    CONFIGS,
    MAX_POSITIONS,
    VOCAB_SIZE,
    config_of,
    hidden_states,
    reference_model,
    texts,
    write_checkpoint,
    write_sentence_files,
)
from workers.checkpoint import Checkpoint, open_checkpoint
from workers.config.encoder_settings import ENCODERS, read_settings, task_of
from workers.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    InvalidEmbedding,
    InvalidSetting,
    UnsupportedCheckpoint,
)
from workers.estimate import estimate
from workers.model.encoder import EmbeddingModel, build_embedding_model
from workers.settings import checked

NEAR = 1e-5
DECODERS = {"qwen3", "gemma3_text"}
reference = cache(reference_model)

LENGTHS = (3, 17, 1, MAX_POSITIONS, 40)


def built(
    family: str, dtype: torch.dtype = torch.float32, sentence: dict[str, Any] | None = None
) -> EmbeddingModel:
    """The tiny model on the tensors of the reference."""
    metadata = {"config": json.dumps(config_of(family))}
    if sentence is not None:
        metadata["sentence"] = json.dumps(sentence)
    return build_embedding_model(metadata, reference(family, dtype=dtype).state_dict(), dtype)


def pooled_by(pooling: str, normalize: bool = False) -> dict[str, Any]:
    modules = [
        {"type": "Transformer", "config": {}},
        {"type": "Pooling", "config": {"pooling_mode": pooling}},
    ]
    return {"modules": modules + [{"type": "Normalize", "config": {}}] * normalize}


def numbers(vector: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(vector), dtype=torch.float32)


def test_every_encoder_that_is_served_is_compared() -> None:
    assert set(CONFIGS) - DECODERS == ENCODERS


@pytest.mark.parametrize("family", CONFIGS)
def test_vectors_in_a_batch_are_those_of_transformers_one_by_one(family: str) -> None:
    model, inputs = built(family), texts(*LENGTHS)
    ours = model.forward(inputs)
    theirs = torch.stack([hidden_states(reference(family), one).mean(dim=0) for one in inputs])
    torch.testing.assert_close(ours, theirs, atol=NEAR, rtol=NEAR)
    assert not torch.allclose(theirs[0], theirs[1], atol=0.01)  # the texts differ, so do vectors
    for index, one in enumerate(inputs):
        alone = model.forward([one])[0]
        torch.testing.assert_close(ours[index], alone, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_longest_text_is_as_long_as_the_model_says(family: str) -> None:
    model = built(family)
    assert model.max_model_len == model.advised_max_model_len == MAX_POSITIONS
    model.warm_up()


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_parameters_alias_the_given_tensors(family: str) -> None:
    tensors = reference(family, dtype=torch.float32).state_dict()
    owned = {tensor.data_ptr() for tensor in tensors.values()}
    module = built(family).module
    assert all(one.data_ptr() in owned for one in module.parameters())
    assert not any(one.is_meta for one in (*module.parameters(), *module.buffers()))
    assert not module.training


def test_matrices_that_were_saved_as_one_are_views_of_it() -> None:
    """The names and the layout of NomicBERT's own files."""
    theirs = {}
    source = reference("nomic_bert").state_dict()
    for name, tensor in source.items():
        if "q_proj" in name:
            parts = [source[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = name.replace("self_attn.q_proj", "attn.Wqkv")
            theirs[fused.replace("layers", "encoder.layers")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            for new, old in (
                ("layers", "encoder.layers"),
                ("embeddings.LayerNorm", "emb_ln"),
                ("self_attn.o_proj", "attn.out_proj"),
                ("up_proj", "fc11"),
                ("gate_proj", "fc12"),
                ("down_proj", "fc2"),
                ("post_attention_layernorm", "norm1"),
                ("post_mlp_layernorm", "norm2"),
            ):
                name = name.replace(new, old)
            theirs[name] = tensor
    metadata = {"config": json.dumps(config_of("nomic_bert"))}
    model = build_embedding_model(metadata, theirs, torch.float32)
    spans = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in theirs.values()]
    for parameter in model.module.parameters():
        begin, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
        assert any(low <= begin and end <= high for low, high in spans)
    inputs = texts(9)
    assert torch.equal(model.forward(inputs), built("nomic_bert").forward(inputs))


def laid_out(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors as instances get them."""
    tensors = {}
    for one in checkpoint.tensors():
        tensors[one.name] = torch.empty(one.shape, dtype=one.dtype)
        checkpoint.copy_into(one.name, tensors[one.name], lambda _: None)
    return tensors


@pytest.mark.parametrize("head", [False, True], ids=["base", "head"])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_checkpoints_of_the_base_model_and_of_one_with_a_head(
    family: str, head: bool, tmp_path: Path
) -> None:
    model = reference(family, head=head)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, model, config_of(family)))
    assert task_of(checkpoint.metadata()) == "embed"
    ours = build_embedding_model(checkpoint.metadata(), laid_out(checkpoint), torch.float32)
    [one] = texts(12)
    theirs = hidden_states(model, one).mean(dim=0)
    torch.testing.assert_close(ours.forward([one])[0], theirs, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max"])
def test_pooling_and_normalization(pooling: str) -> None:
    inputs = texts(5, 9)
    states = [hidden_states(reference("bert"), one) for one in inputs]
    expected = {
        "mean": lambda one: one.mean(dim=0),
        "cls": lambda one: one[0],
        "lasttoken": lambda one: one[-1],
        "max": lambda one: one.amax(dim=0),
    }[pooling]
    plain, normalized = (
        built("bert", sentence=pooled_by(pooling)),
        built("bert", sentence=pooled_by(pooling, True)),
    )
    for index, states_of_one in enumerate(states):
        want = expected(states_of_one)
        ours = plain.forward(inputs)[index]
        torch.testing.assert_close(ours, want, atol=NEAR, rtol=NEAR)
        torch.testing.assert_close(numbers(plain.finish(ours)), want, atol=NEAR, rtol=NEAR)
        short = numbers(normalized.finish(ours, 8))
        torch.testing.assert_close(short, want[:8] / want[:8].norm(), atol=NEAR, rtol=NEAR)
        assert numbers(plain.finish(ours, 8)).shape == (8,)


def test_bf16_is_pooled_in_fp32() -> None:
    model, [one] = built("bert", torch.bfloat16), texts(MAX_POSITIONS)
    states = hidden_states(reference("bert", dtype=torch.bfloat16), one).float()
    vector = model.forward([one])[0]
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector, states.mean(dim=0), atol=0.02, rtol=0.02)


def test_numbers_that_are_not_finite_are_no_vector() -> None:
    model = built("bert")
    with pytest.raises(InvalidEmbedding):
        model.finish(torch.tensor([1.0, float("nan")]))


# --- files


def test_the_files_of_sentence_transformers_decide(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, reference("bert"), config_of("bert"))
    plain = open_checkpoint(folder).fingerprint()
    assert read_settings(open_checkpoint(folder).metadata()).pooling == "mean"
    write_sentence_files(
        folder,
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        ("Transformer", "Pooling"),
        max_seq_length=24,
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.fingerprint() != plain
    settings = read_settings(checkpoint.metadata())
    assert (settings.pooling, settings.normalize, settings.max_seq_length) == ("cls", False, 24)
    model = build_embedding_model(checkpoint.metadata(), laid_out(checkpoint), torch.float32)
    assert (model.advised_max_model_len, model.max_model_len) == (24, MAX_POSITIONS)


def test_a_decoder_embeds_only_where_its_files_say_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, reference("qwen3"), config_of("qwen3"))
    assert task_of(open_checkpoint(folder).metadata()) == "generate"
    write_sentence_files(folder, {"pooling_mode_lasttoken": True})
    metadata = open_checkpoint(folder).metadata()
    assert task_of(metadata) == "embed"
    assert read_settings(metadata).pooling == "last"


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ({"modules": [{"type": "Transformer"}, {"type": "Dense"}]}, "Dense"),
        ({"modules": []}, "no step"),
        (pooled_by("weightedmean"), "weightedmean"),
        (
            {
                "modules": [
                    {"type": "Transformer"},
                    {
                        "type": "Pooling",
                        "config": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
                    },
                ]
            },
            r"cls_token \+ max_tokens",
        ),
    ],
)
def test_steps_that_are_not_computed_are_refused(sentence: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        built("bert", sentence=sentence)


@pytest.mark.parametrize("path", ["../elsewhere", "..", "a/b", "/etc"])
def test_steps_outside_of_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, reference("bert"), config_of("bert"))
    steps = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": path}]
    (folder / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(CheckpointCorrupt, match="not one beside it"):
        open_checkpoint(folder)


def test_other_architectures_are_refused() -> None:
    head = {
        "config": json.dumps(
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
        )
    }
    with pytest.raises(UnsupportedCheckpoint, match="BertForSequenceClassification"):
        task_of(head)
    unknown = {
        "config": json.dumps({"model_type": "fnet"}),
        "sentence": json.dumps(pooled_by("mean")),
    }
    with pytest.raises(UnsupportedCheckpoint, match="fnet"):
        build_embedding_model(unknown, {}, torch.float32)
    metadata = {"config": json.dumps(config_of("bert"))}
    tensors = reference("bert").state_dict()
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(CheckpointMismatch, match=r"encoder.layer.1.output.dense.bias"):
        build_embedding_model(metadata, tensors, torch.float32)


@pytest.mark.parametrize("family", ["bert", "mpnet", "nomic_bert"])
def test_the_estimate_is_of_what_would_be_laid_out(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, reference(family), config_of(family))
    checkpoint = open_checkpoint(folder)
    found = estimate(checkpoint)
    parameters = built(family).module.parameters()
    assert found.num_parameters == sum(one.numel() for one in parameters)
    assert (found.max_model_len, found.dtype) == (MAX_POSITIONS, "float32")
    assert (found.kv_bytes_per_token, found.logits_bytes_per_sequence) == (0, 0)
    assert found.segment_bytes >= 4 * found.num_parameters
    assert found.prefill_bytes > 0
    with pytest.raises(InvalidSetting, match="made for 64 tokens"):
        estimate(checkpoint, checked({"max_model_len": 65}))
    for option in ("tensor_parallel_size", "data_parallel_size"):
        with pytest.raises(InvalidSetting, match="has one rank: leave out --"):
            estimate(checkpoint, checked({option: 2}))


# --- a real model


def test_minilm_as_transformers_computes_it(minilm: Path) -> None:
    checkpoint = open_checkpoint(minilm)
    tensors = load_file(minilm / "model.safetensors")
    model = build_embedding_model(checkpoint.metadata(), tensors, torch.float32)
    assert (model.advised_max_model_len, model.max_model_len, model.embedding_size) == (
        256,
        512,
        384,
    )
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The stock market fell sharply today, and nobody could say why it had.",
    ]
    inputs = [tokenizer.encode(one).ids for one in sentences]
    theirs = AutoModel.from_pretrained(
        minilm, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = [numbers(model.finish(vector)) for vector in model.forward(inputs)]
    for one, vector in zip(inputs, ours, strict=True):
        mean = hidden_states(theirs, one).mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=NEAR, rtol=NEAR)
    near, far = float(ours[0] @ ours[1]), float(ours[0] @ ours[2])
    assert near > 0.7 > 0.2 > far
    assert max(max(one) for one in inputs) > VOCAB_SIZE
