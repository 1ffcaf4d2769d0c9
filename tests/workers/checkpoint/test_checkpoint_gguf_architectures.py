"""Architecture after architecture: a GGUF file, as llama.cpp's converter writes it, computes what
the model does that it was made of.

Weights are random and large. Sizes, and what differs between families, are such that leaving any of
it out changes the tokens. docs/models.md lists the architectures.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.quick import few_quick
from tests.workers.checkpoint.gguf_converter import CONVERTERS, convert
from tests.workers.model.tiny_families import LONGROPE, tiny_model
from tests.workers.tiny_models import generate, prompt
from workers.checkpoint import open_checkpoint
from workers.checkpoint.formats.gguf_architectures import ARCHITECTURES
from workers.conformance.greedy import generated, read_whole
from workers.errors import CheckpointCorrupt, CheckpointNotFound, UnsupportedCheckpoint
from workers.model.decoder import build_model
from workers.placement.resident import Resident

NUM_NEW = 8
PROMPTS = [prompt(length, seed=length) for length in (1, 40)]

_SLIDING = ["sliding_attention"]
_FULL = ["full_attention"]
_BASE = {"rope_theta": 10000.0}
_YARN = {**_BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {**_BASE, "rope_type": "linear", "factor": 4.0}
_LLAMA3 = {**_BASE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"max_position_embeddings": 65536}
_WITHOUT_WINDOWS = {"sliding_window": None}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "arcee-yarn": ("arcee", {"rope_parameters": _YARN}),
    "cohere": ("cohere", {}),
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": _SLIDING * 3 + _FULL}),
    "dots1": ("dots1", {}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "exaone4": ("exaone4", {}),
    "exaone4-full": ("exaone4", {**_WITHOUT_WINDOWS, "layer_types": _FULL * 3}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "head_dim": 8}),
    "gemma3": ("gemma3", {"num_hidden_layers": 6, "layer_types": _SLIDING * 5 + _FULL}),
    "gemma3-scaled": (
        "gemma3",
        {
            "num_hidden_layers": 6,
            "layer_types": _SLIDING * 5 + _FULL,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
    ),
    "glm4": ("glm4", {}),
    "glm4-biases": ("glm4", {"attention_bias": True}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-narrow": ("gpt2", {"n_inner": 96, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0}
        | {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "granitemoe": ("granitemoe", {}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("llama", {"head_dim": 32}),
    "llama-linear": ("llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-all": (
        "llama",
        {
            "rope_parameters": {
                **_YARN,
                "beta_fast": 24.0,
                "beta_slow": 2.0,
                "attention_factor": 1.1,
            }
        },
    ),
    "llama3.1": (
        "llama",
        _LONG
        | {"rope_parameters": _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}},
    ),
    "llama3.2": (
        "llama",
        _LONG
        | {"rope_parameters": _LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}},
    ),
    "llama3-short": (
        "llama",
        {"rope_parameters": _LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", _WITHOUT_WINDOWS),
    "mixtral": ("mixtral", _WITHOUT_WINDOWS),
    "nemotron": ("nemotron", {}),
    "nemotron-linear": (
        "nemotron",
        {"rope_parameters": _LINEAR | {"partial_rotary_factor": 0.5}},
    ),
    "olmo": ("olmo", {}),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "olmoe": ("olmoe", {}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 20}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": _BASE | {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": ("phi3", LONGROPE),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {"rms_norm_eps": 1e-3}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),  # which the file can't say
    "seed_oss": ("seed_oss", {}),
    "seed_oss-without": ("seed_oss", {"attention_bias": False}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
    "starcoder2": ("starcoder2", _WITHOUT_WINDOWS),
    "starcoder2-tied": ("starcoder2", {**_WITHOUT_WINDOWS, "tie_word_embeddings": True}),
}


def read(path: Path) -> Any:
    """As an instance has it."""
    checkpoint = open_checkpoint(path, "float32")
    config = json.loads(checkpoint.metadata()["config"])
    return build_model(config, Resident(read_whole(checkpoint)), torch.float32)


@pytest.mark.parametrize("name", few_quick(MODELS))
def test_tokens_are_those_of_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    reference = tiny_model(family, **changes)
    model = read(convert(reference, tmp_path / "model.gguf"))
    ours, theirs = model.module.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():  # norms with 1 added have lost their last bits
        torch.testing.assert_close(ours[tensor], value, rtol=0, atol=2e-7, msg=tensor)
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPTS[1]])).logits
    assert logits.argmax(-1).unique().numel() > 3
    expected = [generate(reference, one, NUM_NEW) for one in PROMPTS]
    assert generated(model, PROMPTS, NUM_NEW) == expected


def test_every_architecture_is_tried() -> None:
    families = {tiny_model(family).config.model_type for family, _ in MODELS.values()}
    assert {CONVERTERS[family].architecture for family in families} == ARCHITECTURES.keys()


def test_one_projection_of_queries_keys_and_values(tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        reference = tiny_model(family)
        model = read(convert(reference, tmp_path / f"{family}.gguf", fuse_qkv=True))
        for name, value in reference.state_dict().items():
            assert torch.equal(model.module.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["qwen2_moe", "ernie4_5_moe", "llama", "gpt2"])
def test_dimensions_of_one_may_be_left_out(family: str, tmp_path: Path) -> None:
    reference = tiny_model(family)
    path = convert(reference, tmp_path / "model.gguf", requantized=True)
    tensors = read(path).module.state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(tensors[name], value), name


def test_a_window_that_a_file_of_a_llama_names_is_kept(tmp_path: Path) -> None:
    said = {"attention.sliding_window": 8}
    reference = tiny_model("mistral")
    model = read(convert(reference, tmp_path / "model.gguf", said=said))
    assert model.geometry.sliding_windows == (8, 8, 8)
    expected = [generate(reference, one, NUM_NEW) for one in PROMPTS]
    assert generated(model, PROMPTS, NUM_NEW) == expected


@pytest.mark.parametrize(("period", "slide"), [(0, "111111"), (1, "000000"), (3, "110110")])
def test_a_period_of_windows_is_that_of_llamacpp(period: int, slide: str, tmp_path: Path) -> None:
    """0: all layers slide; 1: none does."""
    reference = tiny_model("gemma3", num_hidden_layers=6, layer_types=(_SLIDING * 5 + _FULL))
    said = {"attention.sliding_window_pattern": period}
    path = convert(reference, tmp_path / "model.gguf", said=said)
    config = json.loads(open_checkpoint(path, "float32").metadata()["config"])
    assert config["layer_types"] == [(_FULL, _SLIDING)[int(one)][0] for one in slide]


# --- keys


@pytest.mark.parametrize(
    ("family", "said", "words"),
    [
        ("llama", {"attention.temperature_scale": 0.1}, "temperature_scale = 0.1"),
        ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5"),
        ("llama", {"residual_scale": 0.5}, "residual_scale = 0.5"),
        ("llama", {"rope.freq_base_swa": 500.0}, "some layers by another base"),
        ("llama", {"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "by 'ntk'"),
        ("llama", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1"),
        ("llama", {"rope.dimension_count": 8}, "dimension_count = 8 where heads are of 16"),
        ("llama", {"attention.value_length": 8}, "value_length = 8 where heads are of 16"),
        ("llama", {"attention.head_count_kv": [2, 1, 2]}, "another for each layer"),
        ("llama", {"a.key.of.the.future": 1}, "a.key.of.the.future = 1"),
        ("qwen2", {"attention.sliding_window": 8}, "sliding_window = 8"),
        ("qwen2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen2", {"rope.dimension_sections": [4, 2, 2, 0]}, "dimension_sections = "),
        ("qwen3", {"attention.causal": False}, "causal = False"),
        ("dots1", {"expert_gating_func": 1}, "not weigh its experts by a sigmoid"),
        ("dots1", {"expert_group_scale": 0.5}, "expert_group_scale = 0.5"),
        ("olmo", {"attention.layer_norm_epsilon": 1e-6}, "another epsilon than 1e-5"),
    ],
)
def test_a_key_that_would_change_tokens_is_refused_by_name(
    family: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = convert(tiny_model(family), tmp_path / "odd.gguf", said=said)
    with pytest.raises(UnsupportedCheckpoint, match=rf"odd\.gguf: .*{words}.*safetensors"):
        open_checkpoint(path).metadata()


@pytest.mark.parametrize(
    "said",
    [
        {"attention.causal": True},
        {"expert_count": 0, "expert_used_count": 0},
        {"attention.sliding_window": 0},
        {"attention.head_count_kv": [2, 2, 2]},
        {"rope.scaling.type": "none", "rope.scaling.original_context_length": 64},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scaling.finetuned": False},
        {"logit_scale": 1.0, "final_logit_softcapping": 0.0},
        {"tensor_data_layout": "Meta AI original pth"},
        {"pooling_type": 3},
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_no_reason_to_refuse(
    said: dict[str, Any], tmp_path: Path
) -> None:
    reference = tiny_model("llama")
    model = read(convert(reference, tmp_path / "model.gguf", said=said))
    assert generated(model, PROMPTS, NUM_NEW) == [
        generate(reference, one, NUM_NEW) for one in PROMPTS
    ]


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("quantize.imatrix.file", "a", False),
        ("mradermacher.quantized_by", "somebody", False),
        ("general.type", "adapter", True),
        ("general.type", "mmproj", True),
        ("adapter.type", "lora", True),
        ("clip.has_vision_encoder", "1", True),
        ("xielu.beta", "0.5", True),
        ("qwen2.logit_scale", "0.5", True),
    ],
)
def test_keys_of_others(key: str, value: str, refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string(key, value)
    source = gguf.GGUFReader(convert(tiny_model("llama"), tmp_path / "source.gguf"))
    for field in source.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not refused:
        assert len(open_checkpoint(path).tensors()) == 30
        return
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.gguf"):
        open_checkpoint(path).metadata()


# --- several files


def test_the_parts_of_a_model_are_one(tmp_path: Path) -> None:
    reference = tiny_model("llama")
    first = convert(reference, tmp_path / "model.gguf", num_parts=3)
    assert first.name == "model-00001-of-00003.gguf"
    model = read(first)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name


def test_another_part_is_no_beginning(tmp_path: Path) -> None:
    convert(tiny_model("llama"), tmp_path / "model.gguf", num_parts=3)
    with pytest.raises(UnsupportedCheckpoint, match=r"part 2 of 3 .* give the first part"):
        open_checkpoint(tmp_path / "model-00002-of-00003.gguf").tensors()


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    first = convert(tiny_model("llama"), tmp_path / "model.gguf", num_parts=3)
    (tmp_path / "model-00003-of-00003.gguf").unlink()
    missing = r"model-00003-of-00003\.gguf can't be read \(No such file"
    with pytest.raises(CheckpointNotFound, match=missing):
        open_checkpoint(first).fingerprint()
    with pytest.raises(CheckpointNotFound, match=missing):
        open_checkpoint(first).tensors()


def test_parts_of_other_models_do_not_fit(tmp_path: Path) -> None:
    first = convert(tiny_model("llama"), tmp_path / "model.gguf", num_parts=2)
    second = tmp_path / "model-00002-of-00002.gguf"
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointCorrupt, match="is not part 2"):
        open_checkpoint(first).tensors()


def test_a_first_part_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    first = convert(tiny_model("llama"), tmp_path / "model.gguf", num_parts=2)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UnsupportedCheckpoint, match=r"first of 2 parts.*00001-of-00002"):
        open_checkpoint(tmp_path / "renamed.gguf").tensors()


def test_every_part_is_in_the_fingerprint(tmp_path: Path) -> None:
    first = convert(tiny_model("llama"), tmp_path / "model.gguf", num_parts=2)
    before = open_checkpoint(first).fingerprint()
    second = tmp_path / "model-00002-of-00002.gguf"
    content = second.read_bytes()
    second.unlink()
    second.write_bytes(content + b"\0")
    assert open_checkpoint(first).fingerprint() != before
