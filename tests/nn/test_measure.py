"""Measured times on the CPU: every operation of every recipe, the file that keeps them, and large shapes."""

import json
import logging

import pytest
import torch

import aotrain.nn.measure as module
from aotrain.nn.linear_work import Cast, Gemm
from aotrain.nn.measure import Measured, cache_file
from aotrain.nn.plan import make_plan
from aotrain.recipes import HIGH_PRECISION, RECIPES

CPU = torch.device("cpu")
SHAPES = [("up", 64, 32), ("down", 32, 64)]


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch):
    monkeypatch.setattr(module, "_REPEATS", 2)
    monkeypatch.setattr(module, "_WARMUP", 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_measured(tmp_path, recipe):
    plan = make_plan(SHAPES, recipe, tokens=48, times=Measured(CPU, folder=tmp_path))
    assert plan.times == "CPU, measured"
    assert plan.problem is None
    assert all(row.bf16_seconds > 0 and row.cast_seconds > 0 and row.gemm_seconds > 0 for row in plan.rows)


def test_a_shape_is_measured_once_and_kept(tmp_path, monkeypatch):
    plans = [make_plan(SHAPES, "float8_rowwise", tokens=48, times=Measured(CPU, folder=tmp_path)) for _ in range(2)]
    assert plans[0] == plans[1]
    (path,) = tmp_path.iterdir()
    assert path == cache_file("CPU", tmp_path)
    assert f"torch{torch.__version__}" in path.name
    assert all(seconds > 0 for seconds in json.loads(path.read_text()).values())
    monkeypatch.setattr(Measured, "_time", lambda self, run: 1.0)
    again = make_plan(SHAPES, "float8_rowwise", tokens=48, times=Measured(CPU, folder=tmp_path, refresh=True))
    assert again.rows[0].bf16_seconds == 3.0


def test_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file("NVIDIA H100 80GB HBM3").parent == tmp_path / "aotrain" / "plan"
    assert " " not in cache_file("NVIDIA H100 80GB HBM3").name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file("x").is_relative_to(tmp_path / "home" / ".cache")


@pytest.mark.parametrize("text", ["{", "[1]", '{"gemm": "fast"}'])
def test_a_broken_file_is_replaced_with_a_warning(tmp_path, caplog, text):
    path = cache_file("CPU", tmp_path)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        times = Measured(CPU, folder=tmp_path)
    assert "measuring again" in caplog.text
    assert times.cast(Cast(16, 16, None, True)) > 0
    assert json.loads(path.read_text())


def test_large_shapes_are_measured_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ELEMENTS", 3 * 32 * 32)
    shapes = []
    monkeypatch.setattr(Measured, "_time", lambda self, run: 1.0)
    monkeypatch.setattr(Measured, "_randn", lambda self, *shape: shapes.append(shape) or torch.zeros(shape))
    times = Measured(CPU, folder=tmp_path)
    assert times.gemm(Gemm(128, 32, 64, HIGH_PRECISION)) == 8.0
    assert shapes == [(32, 32), (32, 32)]
