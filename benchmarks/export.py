"""Export a checkpoint of more than a billion parameters in every format, and measure the memory that it takes.

    python -m benchmarks.export [CASE ...] [--out benchmarks/results] [--folder /tmp]

The checkpoint has the shapes of Llama 3.2 1B: 1.24 billion bfloat16 parameters, random, in shards of about half a
gigabyte, of which the first is the embedding alone. Each case is exported in a process of its own, read back and
compared, after a small export that loads what is loaded once. Prints and appends to export.csv: the largest resident
set beyond that of the start, mapped pages of files included, and the anonymous part of it, sampled every 5 ms; both as
a fraction of the largest shard; seconds; bytes. Exits with status 1 when the fraction is more than one.
"""

import argparse
import datetime
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.run import ROOT, append_rows, environment

COLUMNS = (
    "date", "case", "parameters", "shards", "largest_shard_mb", "peak_rss_mb", "peak_anonymous_mb", "peak_shards",
    "bound_shards", "seconds", "bytes_before", "bytes_after", "hardware", "driver", "torch", "triton", "commit",
    "command",
)  # fmt: skip

# Case -> arguments of export. Every layout of every format, and those that write more bytes than they read.
CASES: dict[str, Mapping[str, str]] = {
    "compressed-tensors-int4-g32": {"scheme": "int4-g32"},
    "compressed-tensors-int8": {"scheme": "int8"},
    "compressed-tensors-fp8": {"scheme": "fp8"},
    "compressed-tensors-nvfp4": {"scheme": "nvfp4"},
    "compressed-tensors-mxfp4": {"scheme": "mxfp4"},
    "torchao-int4-g32": {"scheme": "int4-g32", "format": "torchao"},
    "torchao-8da4w": {"scheme": "8da4w", "format": "torchao"},
    "gguf-grid-float32": {"scheme": "q4_0", "format": "gguf-grid"},
    "gguf-grid-float16": {"scheme": "q4_0", "format": "gguf-grid", "dtype": "float16"},
    "float8-block": {"scheme": "fp8-block", "format": "float8-block"},
}
BOUND = 1.0
SHARD_BYTES = 500_000_000
LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 16, 2048, 8192, 512, 128256

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from aotrain.export import export

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

def sample():
    while not done.wait(0.005):
        anonymous.append(status("RssAnon"))

root, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
if "dtype" in arguments:
    arguments["dtype"] = getattr(torch, arguments["dtype"])
export(root / "small", root / "small_out", **arguments)
done, anonymous = threading.Event(), [status("RssAnon")]
thread = threading.Thread(target=sample)
thread.start()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before, start = status("VmRSS"), time.perf_counter()
report = export(root / "large", root / "large_out", **arguments)
seconds, peak = time.perf_counter() - start, status("VmHWM") - before
done.set()
thread.join()
assert report.verified
print(json.dumps([peak, max(anonymous) - anonymous[0], seconds, report.bytes_before, report.bytes_after]))
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    parser.add_argument("--folder", type=Path, default=None, help="where to put 8 GB for as long as it takes")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"got {', '.join(unknown)}; want some of {', '.join(CASES)}")
    command = shlex.join(["python", "-m", "benchmarks.export", *(sys.argv[1:] if arguments is None else arguments)])
    where = environment(torch.device("cpu")) | {"command": command}
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        write_checkpoint(root / "small", layers=1, vocabulary=1024)
        parameters, shards = write_checkpoint(root / "large", LAYERS, VOCABULARY)
        for name in options.cases or CASES:
            row = measure(name, root, max(shards))
            row |= {"parameters": parameters, "shards": len(shards)}
            append_rows(options.out / "export.csv", [row | where], COLUMNS)
            worst = max(worst, float(row["peak_shards"]))
    return int(worst > BOUND)


def measure(name: str, root: Path, shard: int) -> dict[str, Any]:
    """Row of one case, whose largest shard has so many bytes."""
    command = [sys.executable, "-c", MEASURE, str(root), json.dumps(dict(CASES[name]))]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    peak, anonymous, seconds, before, after = json.loads(output.splitlines()[-1])
    for made in ("small_out", "large_out"):
        shutil.rmtree(root / made)
    row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "case": name,
        "largest_shard_mb": f"{shard / 1e6:.1f}",
        "peak_rss_mb": f"{peak / 1e6:.1f}",
        "peak_anonymous_mb": f"{anonymous / 1e6:.1f}",
        "peak_shards": f"{peak / shard:.3f}",
        "bound_shards": BOUND,
        "seconds": f"{seconds:.1f}",
        "bytes_before": before,
        "bytes_after": after,
    }
    print(
        f"{name:28} {row['peak_rss_mb']:>7} MB, {row['peak_shards']} of a shard ({row['peak_anonymous_mb']} MB "
        f"anonymous), {row['seconds']} s, {after / 1e9:.2f} GB",
        flush=True,
    )
    return row


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> tuple[int, list[int]]:
    """A random checkpoint with the output layer tied to the embedding; parameters, and bytes of each shard."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        shapes |= _layer_shapes(f"model.layers.{layer}.")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for key, shape in shapes.items():
        if sum(2 * torch.Size(each).numel() for each in (*shards[-1].values(), shape)) > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][key] = shape
    generator = torch.Generator().manual_seed(0)
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: _random(shape, generator) for key, shape in shard.items()}, folder / name, {"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return parameters, [(folder / name).stat().st_size for name in names]


def _layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    matrices = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (HEADS, WIDTH),
        "self_attn.v_proj": (HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    norms: dict[str, tuple[int, ...]] = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    return {f"{prefix}{name}.weight": shape for name, shape in (matrices | norms).items()}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers, made by parts of rows: in float32 all of them would be twice the shard."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for part in tensor.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator))
    return tensor


if __name__ == "__main__":
    sys.exit(main())
