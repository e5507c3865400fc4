"""How much of what quantization costs does quantization-aware training win back?

    python -m benchmarks.recovery [--seeds 0 1 2] [--schemes int2-g32 int4-g32-a4] [--steps 250] [--out FOLDER]

Per seed, a small Llama is trained on the source of Python's standard library, bytes as tokens. From there two runs go
on with the same data, steps and learning rate: the control in full precision, and one with fake quantization per
scheme. Held-out text then gives, in nats and as perplexity per byte:

    control        the control
    ptq            the control, quantized without training
    qat            the run with fake quantization; its converted model must give the same, digit by digit
    recovery       (ptq - qat) / (ptq - control), in nats

Prints and appends one row per seed and scheme to recovery.csv. A gap below 2 % of the control's perplexity is written,
but without a recovery: it would be noise.
"""

import argparse
import copy
import datetime
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aotrain.integrations.torchtitan.corpora import stdlib_documents
from aotrain.optim import AdamW8bit
from aotrain.qat import convert_qat, prepare_qat
from benchmarks.run import ROOT, append_rows, environment

COLUMNS = (
    "date", "scheme", "seed", "parameters", "base_steps", "steps", "lr", "control_nll", "ptq_nll", "qat_nll",
    "control_ppl", "ptq_ppl", "qat_ppl", "gap_percent", "recovery", "seconds", "hardware", "driver", "torch", "triton",
    "commit", "command",
)  # fmt: skip
# Below this share of the control's perplexity, what quantization costs is within the noise of training.
MIN_GAP = 0.02
CONTEXT, BATCH = 256, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A model and its schedule.

    Attributes:
        hidden: width; the feed-forward layers are 8/3 as wide, rounded to a multiple of 32.
        layers: transformer blocks.
        base_steps: steps before the two runs part.
        steps: steps of each.
        base_lr: peak learning rate before.
        lr: peak learning rate after.
        eval_windows: windows of held-out text.
    """

    hidden: int = 256
    layers: int = 4
    base_steps: int = 1200
    steps: int = 250
    base_lr: float = 3e-3
    lr: float = 1e-3
    eval_windows: int = 128


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=["int2-g32", "int4-g32-a4"])
    parser.add_argument("--steps", type=int, default=Sizes().steps, help="steps of control and QAT")
    parser.add_argument("--lr", type=float, default=Sizes().lr, help="peak learning rate of control and QAT")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.recovery", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(torch.device("cpu")) | {"command": command}
    for seed in options.seeds:
        for row in compare(seed, options.schemes, Sizes(steps=options.steps, lr=options.lr)):
            append_rows(options.out / "recovery.csv", [row | where], COLUMNS)
    return 0


def compare(seed: int, schemes: list[str], sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of one seed."""
    texts = {split: _bytes(split) for split in ("train", "validation")}
    base = build(seed, sizes)
    train(base, texts["train"], sizes.base_steps, sizes.base_lr, seed)
    control = copy.deepcopy(base)
    train(control, texts["train"], sizes.steps, sizes.lr, seed + 1000)
    control_nll = nll(control, texts["validation"], sizes)
    print(f"seed {seed}: control {control_nll:.4f} nats, perplexity {math.exp(control_nll):.4f}", flush=True)
    rows = []
    for scheme in schemes:
        start = time.perf_counter()
        ptq = copy.deepcopy(control)
        prepare_qat(ptq, scheme)
        model = copy.deepcopy(base)
        prepare_qat(model, scheme)
        train(model, texts["train"], sizes.steps, sizes.lr, seed + 1000)
        qat_nll = nll(model, texts["validation"], sizes)
        convert_qat(model)
        if (converted := nll(model, texts["validation"], sizes)) != qat_nll:
            raise RuntimeError(f"{scheme}: the converted model has {converted} nats, the trained one {qat_nll}")
        found = _figures(control_nll, nll(ptq, texts["validation"], sizes), qat_nll)
        about = {"scheme": scheme, "seed": seed, "parameters": sum(each.numel() for each in base.parameters())}
        schedule = {"base_steps": sizes.base_steps, "steps": sizes.steps, "lr": sizes.lr}
        rows.append(
            {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
            | (about | schedule | found | {"seconds": round(time.perf_counter() - start, 1)})
        )
        print(f"seed {seed}: {scheme}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return rows


def _figures(control: float, ptq: float, qat: float) -> dict[str, Any]:
    nats = {"control": control, "ptq": ptq, "qat": qat}
    gap = math.exp(ptq - control) - 1
    return (
        {f"{name}_nll": value for name, value in nats.items()}
        | {f"{name}_ppl": math.exp(value) for name, value in nats.items()}
        | {"gap_percent": round(100 * gap, 3)}
        | {"recovery": round((ptq - qat) / (ptq - control), 4) if gap >= MIN_GAP else ""}
    )


def build(seed: int, sizes: Sizes) -> LlamaForCausalLM:
    """A Llama over bytes with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=-(-sizes.hidden * 8 // 3 // 32) * 32,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, lr: float, seed: int) -> None:
    """Train in place on random windows, with AdamW8bit, a warm-up of 5 % and a cosine to zero."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamW8bit(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    for step in range(steps):
        factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        loss = _loss(model, torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def nll(model: torch.nn.Module, text: torch.Tensor, sizes: Sizes) -> float:
    """Mean negative log-likelihood per byte of held-out windows, in nats."""
    model.eval()
    windows = text[: sizes.eval_windows * (CONTEXT + 1)].view(-1, CONTEXT + 1).long()
    return sum(_loss(model, batch).item() * len(batch) for batch in windows.split(BATCH)) / len(windows)


def _loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def _bytes(split: str) -> torch.Tensor:
    return torch.frombuffer(bytearray("\n".join(stdlib_documents(split)).encode()), dtype=torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
