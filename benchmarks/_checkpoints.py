"""Checkpoints that benchmarks make: random Llamas, and the very weights that are served as a folder
that transformers reads."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LlamaSize:
    """What the number of parameters follows from."""

    num_layers: int
    hidden: int = 2048
    inner: int = 5632
    num_heads: int = 32
    num_kv_heads: int = 8
    vocab: int = 49152


def demo_tokenizer(folder: Path) -> None:
    """The demo model's, in a folder that this makes."""
    from server.models.source import DEMO, find_model
    from server.text.tokenizer_files import tokenizer_folder

    shutil.copytree(tokenizer_folder(find_model(DEMO).path), folder)


def random_llama(
    folder: Path,
    size: LlamaSize,
    write_tokenizer: Callable[[Path], object] = demo_tokenizer,
    device: str = "cpu",
) -> Path:
    """A Llama in bfloat16 with random weights, drawn on `device`."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    write_tokenizer(folder)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    hidden, inner = size.hidden, size.inner
    of_keys = hidden // size.num_heads * size.num_kv_heads
    shapes = {"model.embed_tokens.weight": (size.vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(size.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (of_keys, hidden),
                "self_attn.v_proj": (of_keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_qwen3_moe(folder: Path, num_layers: int) -> Path:
    """The first layers of a Qwen3-30B-A3B in bfloat16 with random weights and the demo's
    vocabulary. The layers' experts are the files' parts as they come: one tensor each."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    demo_tokenizer(folder)
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (49152, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(num_layers):
        own = {
            "self_attn.q_proj": (4096, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 4096),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
            "mlp.gate": (128, 2048),
            "input_layernorm": (2048,),
            "post_attention_layernorm": (2048,),
        }
        for expert in range(128):
            own |= {
                f"mlp.experts.{expert}.gate_proj": (768, 2048),
                f"mlp.experts.{expert}.up_proj": (768, 2048),
                f"mlp.experts.{expert}.down_proj": (2048, 768),
            }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_served_weights(source: str, runtime_dir: Path, checkpoint: Path) -> None:
    """The very weights that are served, as a Hugging Face folder."""
    script = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from allocator import connect
from workers.checkpoint import attach, open_checkpoint
with connect(sys.argv[1]) as memory:
    weights = attach(memory, open_checkpoint(sys.argv[2]))
    folder = Path(sys.argv[3])
    folder.mkdir()
    (folder / "config.json").write_text(weights.metadata["config"])
    save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
"""
    subprocess.run(
        [sys.executable, "-P", "-c", script, str(runtime_dir), source, str(checkpoint)], check=True
    )
