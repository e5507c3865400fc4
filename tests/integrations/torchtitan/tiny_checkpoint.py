"""Hugging Face folders of tiny models with random weights and the byte tokenizer, made without transformers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 257,
    "dtype": "float32",
}
# As Llama 3.1, and tied as Llama 3.2.
LLAMA3 = LLAMA | {
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# Heads are wider than hidden_size / num_attention_heads, as in the real ones.
QWEN3 = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def weights(config: dict) -> dict[str, torch.Tensor]:
    """Random weights under the names of a checkpoint; norms are not all ones."""
    dim, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens": (config["vocab_size"], dim), "model.norm": (dim,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], dim)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{name}_layernorm": (dim,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj": (rows, dim) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{layer}.mlp.gate_proj": (hidden, dim), f"{layer}.mlp.up_proj": (hidden, dim)}
        shapes |= {f"{layer}.self_attn.o_proj": (dim, q), f"{layer}.mlp.down_proj": (dim, hidden)}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm": (head,) for name in "qk"}
    generator = torch.Generator().manual_seed(0)
    drawn = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.2 * value if value.dim() == 1 else 0.1 * value for name, value in drawn.items()}


def write_checkpoint(folder: Path, config: dict = LLAMA, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder with config.json, weights and tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in byte_tokenizer_dir().iterdir():
        shutil.copy(path, folder / path.name)
    return folder
