"""Fine-tune adapters for a quantized server in three ways, and compare the perplexities that are served.

    python -m benchmarks.qat_lora [--out benchmarks/results] [--scheme int2-g32] [--seeds 0 1 2]

A small Llama learns bytes of Python's standard library; then LoRA adapters of all its linear layers but the output
layer continue, with the same data, seed and initialization:

- plain: in high precision;
- base: beside the fake-quantized frozen weight, the adapter's product in high precision;
- merged: on the fake-quantized sum of both, which is `qat_lora_config`.

Served is the merged model with its weights quantized, the same way for all. Of what quantizing plain LoRA loses, the
recovered share is (served plain - served) / (served plain - plain in high precision). Prints and appends to
qat_lora.csv, per seed and variant, the perplexities of held-out text as training saw it, merged, and served.
"""

import argparse
import datetime
import hashlib
import math
import shlex
import sys
import sysconfig
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from aotrain.integrations.huggingface.peft import qat_lora_config
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.quantization import Scheme, get_scheme
from benchmarks.run import ROOT, append_rows, environment

COLUMNS = (
    "date", "scheme", "seed", "variant", "base_steps", "adapter_steps", "base_ppl", "base_served_ppl", "trained_ppl",
    "merged_ppl", "served_ppl", "recovered_percent", "seconds", "text", "hardware", "driver", "torch", "triton",
    "commit", "command",
)  # fmt: skip
CONTEXT, BATCH = 256, 8
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, RATE = 16, 2e-3
VARIANTS = ("plain", "base", "merged")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of qat_lora.csv")
    parser.add_argument("--scheme", default="int2-g32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the adapters and their data")
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--adapter-steps", type=int, default=120)
    parser.add_argument("--hidden-size", type=int, default=128)
    options = parser.parse_args(arguments)
    scheme, text = get_scheme(options.scheme), standard_library()
    command = shlex.join(["python", "-m", "benchmarks.qat_lora", *(sys.argv[1:] if arguments is None else arguments)])
    common = {
        "date": datetime.date.today().isoformat(),
        "scheme": options.scheme,
        "base_steps": options.base_steps,
        "adapter_steps": options.adapter_steps,
        "text": fingerprint(text),
        **environment(torch.device("cpu")),
        "command": command,
    }
    model = small_llama(options.hidden_size)
    start = time.monotonic()
    train(model, text, options.base_steps, 3e-3, seed=0)
    base_ppl = perplexity(model, text)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_weights(model, scheme)
    common |= {"base_ppl": round(base_ppl, 4), "base_served_ppl": round(perplexity(model, text), 4)}
    print(f"base {base_ppl:.4f}, served {common['base_served_ppl']}, {time.monotonic() - start:.0f} s", flush=True)
    for seed in options.seeds:
        plain: tuple[float, float] | None = None
        for variant in VARIANTS:
            start = time.monotonic()
            model.load_state_dict(state)
            seen, merged, served = fine_tune(model, variant, scheme, text, options.adapter_steps, seed)
            seconds = time.monotonic() - start
            plain = plain or (merged, served)
            recovered = 100 * (plain[1] - served) / (plain[1] - plain[0])
            row = {"seed": seed, "variant": variant, "trained_ppl": round(seen, 4), "merged_ppl": round(merged, 4)}
            row |= {"served_ppl": round(served, 4), "recovered_percent": round(recovered, 1), "seconds": round(seconds)}
            append_rows(options.out / "qat_lora.csv", [common | row], COLUMNS)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return 0


class FakeQuantizedBase(torch.nn.Linear):
    """A linear layer with a fake-quantized weight, for peft to put an adapter beside."""

    scheme: Scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantized_linear(x, self.weight, self.bias, self.scheme.activation, self.scheme.weight)


def fine_tune(
    model: LlamaForCausalLM, variant: str, scheme: Scheme, text: dict[str, torch.Tensor], steps: int, seed: int
) -> tuple[float, float, float]:
    """Perplexities of one run: as training saw it, merged in high precision, and served; leaves the model changed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, task_type="CAUSAL_LM")
    if variant == "base":
        set_class(model, FakeQuantizedBase, scheme)
    adapted = get_peft_model(model, qat_lora_config(config, scheme) if variant == "merged" else config)
    train(adapted, text, steps, RATE, seed=seed + 1)
    seen = perplexity(adapted, text)
    adapted.merge_and_unload()
    if variant == "base":
        set_class(model, torch.nn.Linear, scheme)
    merged = perplexity(model, text)
    quantize_weights(model, scheme)
    model.requires_grad_(True)
    return seen, merged, perplexity(model, text)


def set_class(model: torch.nn.Module, cls: type[torch.nn.Linear], scheme: Scheme) -> None:
    """Make linear layers, but the output layer, of a class."""
    for layer in linear_layers(model):
        layer.__class__ = cls
        layer.scheme = scheme


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Those that are quantized: not the output layer."""
    named = model.named_modules()
    return [module for name, module in named if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def quantize_weights(model: torch.nn.Module, scheme: Scheme) -> None:
    """Replace the weights by what a server decodes."""
    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.copy_(scheme.weight.values(layer.weight))


def small_llama(hidden_size: int) -> LlamaForCausalLM:
    """A byte-level Llama of two layers, random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=2,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            max_position_embeddings=CONTEXT,
        )
    )


def standard_library() -> dict[str, torch.Tensor]:
    """Bytes of Python's own modules without its tests: "train", and "held_out" for a 30th of the files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not any(part in ("site-packages", "dist-packages", "test", "tests", "idlelib") for part in Path(name).parts):
            held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 30 == 0
            parts["held_out" if held_out else "train"].append(path.read_bytes())
    return {part: torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8) for part, texts in parts.items()}


def fingerprint(text: dict[str, torch.Tensor]) -> str:
    """Which text it was: Python's version and a digest."""
    digest = hashlib.sha256(b"".join(text[part].numpy().tobytes() for part in ("train", "held_out"))).hexdigest()
    return f"Python {sys.version.split()[0]} stdlib {digest[:12]}"


def train(model: torch.nn.Module, text: dict[str, torch.Tensor], steps: int, rate: float, *, seed: int) -> None:
    """AdamW with a short warm-up and a cosine to a tenth, in bfloat16 autocast."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator, tokens = torch.Generator().manual_seed(seed), text["train"]
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        rows = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()]).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: torch.nn.Module, text: dict[str, torch.Tensor], rows: int = 128) -> float:
    """Per byte, of the first rows of the held-out text."""
    model.eval()
    tokens = text["held_out"]
    table = tokens[: min(rows, len(tokens) // CONTEXT) * CONTEXT].view(-1, CONTEXT).long()
    losses = []
    for batch in table.split(16):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch).loss.item() * len(batch))
    return math.exp(sum(losses) / len(table))


if __name__ == "__main__":
    sys.exit(main())
