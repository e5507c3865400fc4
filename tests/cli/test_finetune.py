"""`aotrain finetune` as a user types it: overrides by key, mistakes with their place, checks without training."""

import subprocess
import sys
from pathlib import Path

import pytest

from aotrain.cli.finetune import keys_as_options
from tests.cli.test_commands import ROOT, aotrain

TINY = ROOT / "configs" / "finetune" / "tiny_int2_offline_cpu.yaml"


def test_help():
    result = aotrain("finetune", "--help")
    assert result.returncode == 0
    assert "--optimizer.lr 1e-4" in result.stdout


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("r.yaml --optimizer.lr 1e-4 --check", "r.yaml --set optimizer.lr=1e-4 --check"),
        ("--lora null r.yaml", "--set lora=null r.yaml"),
        ("r.yaml --engine=trl --nproc 2", "r.yaml --set engine=trl --nproc 2"),
        ("r.yaml --trainer.bf16 --model.dtype float32", "r.yaml --set trainer.bf16=true --set model.dtype=float32"),
        ("r.yaml --optimizer.eps -1", "r.yaml --set optimizer.eps=-1"),
        ("r.yaml --set a=b --trainer.max_steps 3", "r.yaml --set a=b --set trainer.max_steps=3"),
    ],
)
def test_keys_of_the_recipe_are_options(typed: str, meant: str):
    assert keys_as_options(typed.split()) == meant.split()


def test_mistakes_have_their_place_and_torch_is_not_loaded(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m}\ndata: {path: d}\noptimizer: {name: adamw8bit, lrr: 1}\ntrainer: {output_dir: o}\n"
    )
    script = (
        "import sys\nfrom aotrain.cli.main import main\n"
        f"sys.argv = ['aotrain', 'finetune', {str(recipe)!r}, '--optimizer.lr', '2e-5', '--quantize.scheme', 'int4']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{recipe}:3: optimizer.lrr: unknown key; did you mean 'optimizer.lr'?" in result.stderr
    assert "--quantize.scheme: quantize.scheme: got 'int4', want one of int2-g32" in result.stderr


def test_the_libraries_mistakes_have_their_place_too(tmp_path: Path):
    result = aotrain("finetune", TINY, "--trainer.max_stepz", 3, "--trainer.output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert (
        "--trainer.max_stepz: trainer.max_stepz: unknown key of trl.SFTConfig; did you mean 'trainer.max_steps'?"
        in (result.stderr)
    )
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_check_says_what_is_converted_and_trains_nothing(tmp_path: Path):
    change = ["--quantize", "null", "--export", "null", "--evaluate", "null", "--float8", "rowwise"]
    result = aotrain("finetune", TINY, *change, "--trainer.output_dir", tmp_path / "out", "--check")
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout
    assert "float8 training: converted" in result.stdout
    assert f"{TINY}: ok" in result.stdout
    assert not (tmp_path / "out").exists()


def test_several_processes_print_a_torchrun_line(tmp_path: Path):
    change = ["--quantize", "null", "--export", "null", "--evaluate", "null", "--trainer.max_steps", 2]
    change += [
        "--data.max_rows",
        40,
        "--trainer.output_dir",
        tmp_path / "out",
        "--trainer.per_device_train_batch_size",
        1,
    ]
    result = aotrain("finetune", TINY, *change, "--nproc", 2)
    assert result.returncode == 0, result.stderr
    assert "torchrun --standalone --nproc-per-node 2 -m aotrain.cli finetune" in result.stderr
    assert (tmp_path / "out" / "summary.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()
