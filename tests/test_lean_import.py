"""Importing aotrain is cheap and has no side effects. Times are of the CPU, which a busy machine does not stretch."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys, time
import torch
environment, threads, modules = dict(os.environ), torch.get_num_threads(), set(sys.modules)
start = time.process_time()
import {module}
{use}
seconds = time.process_time() - start
print(json.dumps({{
    "seconds": seconds,
    "loaded": sorted(set(sys.modules) - modules),
    "environment": dict(os.environ) == environment,
    "threads": torch.get_num_threads() == threads,
    "cuda": torch.cuda.is_initialized(),
}}))
"""
HEAVY = {
    "triton",
    "torchtitan",
    "transformers",
    "datasets",
    "wandb",
    "matplotlib",
    "pandas",
    "torch.distributed.tensor",
}


def probe(module: str, use: str = "") -> dict:
    """Import in a fresh interpreter, from another folder, so that the installed package is found.

    Byte code may be written, as for a user: the second import of three does not compile the sources.
    """
    hidden = ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    script = PROBE.format(module=module, use=use)
    output = subprocess.run(
        [sys.executable, "-c", script], cwd="/", env=environment, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(output)


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("aotrain", ""),
        ("aotrain", "aotrain.convert_to_float8_training, aotrain.AdamW8bit"),
        ("aotrain.optim", ""),
        ("aotrain.integrations.huggingface", ""),
    ],
    ids=["package", "names", "optim", "huggingface"],
)
def test_import_adds_little_and_changes_nothing(module: str, use: str):
    results = [probe(module, use) for _ in range(3)]
    assert min(result["seconds"] for result in results) <= 0.3
    for result in results:
        assert result["environment"]
        assert result["threads"]
        assert not result["cuda"]
        assert not HEAVY & set(result["loaded"])


def test_the_command_checks_a_job_without_torch():
    script = (
        "import sys; sys.argv = ['aotrain', 'pretrain', 'no_such_job.yaml']\n"
        "from aotrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no_such_job.yaml" in result.stderr
