"""The demo: the same small Llama trained in float8 and in bfloat16, and both loss curves in one picture.

    make demo

Trains configs/pretrain/llama3_debug_float8_rowwise_*.yaml and its bfloat16 twin into runs/demo/, about two minutes
each on two CPU cores, and draws runs/demo/curves.png. On a machine with a float8 GPU the same jobs run there.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from aotrain.kernels import native_scaled_mm_problem

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "runs" / "demo"
JOBS = {"float8_rowwise": "llama3_debug_float8_rowwise_cpu", "bfloat16": "llama3_debug_bf16_cpu"}


def main() -> int:
    """Run both jobs and compare them; returns the exit status of the first command that failed."""
    device = "cuda" if has_float8_gpu() else "cpu"
    print(f"demo: training {' and '.join(JOBS)} on {device}")
    for label, job in JOBS.items():
        # A finished run is trained anew; one that was interrupted continues.
        if (OUTPUT / label / "summary.json").exists():
            shutil.rmtree(OUTPUT / label)
        status = aotrain(
            "pretrain",
            str(ROOT / "configs" / "pretrain" / f"{job}.yaml"),
            *("--set", f"output_dir={OUTPUT / label}"),
            *("--set", f"training.device={device}"),
        )
        if status:
            return status
    runs = [str(OUTPUT / label) for label in JOBS]
    return aotrain("curves", *runs, "--out", str(OUTPUT / "curves.png"), "--title", "Llama debug model, stdlib text")


def has_float8_gpu() -> bool:
    """Whether the default GPU multiplies float8 rowwise."""
    return torch.cuda.is_available() and native_scaled_mm_problem(torch.device("cuda"), rowwise=True) is None


def aotrain(*arguments: str) -> int:
    """Run the aotrain command of this environment."""
    return subprocess.run([sys.executable, "-m", "aotrain.cli", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
