"""The benchmark runner: rows with their origin, and no row for a wrong result."""

import csv

import pytest
import torch

from aotrain.recipes import RECIPES
from benchmarks import linear_case, moe, nvfp4, qat, registry, routing, run
from benchmarks.case import Case

ORIGIN = ("hardware", "driver", "torch", "triton", "commit")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(registry, "CPU_SHAPES", ((256, 512),))


def test_rows_say_where_they_come_from(small, tmp_path, capsys):
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 0
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 0
    rows = list(csv.DictReader((tmp_path / "scaled_cast.csv").open()))
    casts = [f"scaled_cast-{name}{way}" for name in registry.CASTS for way in ("", "-of-t", "-both")]
    assert [row["case"] for row in rows] == 2 * [*casts, "copy"]
    for row in rows:
        assert float(row["q10_ms"]) <= float(row["median_ms"]) <= float(row["q90_ms"])
        assert float(row["gb_per_s"]) > 0
        assert row["torch"] == torch.__version__
        assert all(row[key] for key in ("date", "hardware", "triton", "commit"))
        assert row["command"].startswith("python -m benchmarks.run scaled_cast")
    assert "GB/s" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(small, tmp_path, capsys, monkeypatch):
    def wrong() -> None:
        raise AssertionError("bits differ")

    def broken(device):
        yield Case(name="bad", shape="1x1", run=lambda: None, check=wrong, bytes_moved=1)

    monkeypatch.setitem(run.BENCHMARKS, "scaled_cast", broken)
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "3"]) == 1
    assert "bad 1x1 is wrong and was not timed: bits differ" in capsys.readouterr().err
    assert list(csv.DictReader((tmp_path / "scaled_cast.csv").open())) == []


def test_cases_of_a_group_run_in_turns(tmp_path, monkeypatch):
    order = []

    def cases(device):
        for name, group in (("alone", ""), ("first", "g"), ("second", "g"), ("wrong", "g"), ("other", "h")):
            yield Case(
                name=name,
                shape="1x1",
                run=lambda name=name: order.append(name),
                check=wrong if name == "wrong" else lambda: None,
                bytes_moved=1,
                group=group,
            )

    def wrong() -> None:
        raise AssertionError("bits differ")

    monkeypatch.setitem(run.BENCHMARKS, "scaled_cast", cases)
    assert run.main(["scaled_cast", "--out", str(tmp_path), "--repeats", "2"]) == 1
    assert order == 5 * ["alone"] + 5 * ["first", "second"] + 5 * ["other"]


def test_a_run_that_is_cut_off_keeps_its_rows_and_resumes(tmp_path, monkeypatch, capsys):
    stops = ["c"]

    def cases(device):
        for name, group in (("a", "g"), ("b", "g"), ("c", "")):
            yield Case(
                name=name,
                shape="1x1",
                run=lambda: None,
                check=lambda name=name: stop(name),
                bytes_moved=1,
                group=group,
            )

    def stop(name):
        if name in stops:
            stops.clear()
            raise KeyboardInterrupt

    monkeypatch.setitem(run.BENCHMARKS, "scaled_cast", cases)
    arguments = ["scaled_cast", "--out", str(tmp_path), "--repeats", "7", "--resume"]
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments)
    assert [row["case"] for row in csv.DictReader((tmp_path / "scaled_cast.csv").open())] == ["a", "b"]
    assert run.main([*arguments, "--limit", "-1"]) == 2
    assert "run again with --resume" in capsys.readouterr().err
    assert run.main(arguments) == 0
    assert [row["case"] for row in csv.DictReader((tmp_path / "scaled_cast.csv").open())] == ["a", "b", "c"]
    monkeypatch.setattr(run, "environment", lambda device: dict.fromkeys(ORIGIN, "another commit"))
    assert run.main(arguments) == 0
    assert len(list(csv.DictReader((tmp_path / "scaled_cast.csv").open()))) == 6


def test_float8_measures_our_recipes_beside_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_case, "CPU_SHAPES", ((64, 128, 96),))
    assert run.main(["float8", "--out", str(tmp_path), "--repeats", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "float8.csv").open()))
    names = [row["case"].removeprefix("float8-") for row in rows]
    assert names[:4] == ["bf16", "aotrain-tensorwise", "aotrain-rowwise", "aotrain-rowwise_with_gw_hp"]
    assert {row["shape"] for row in rows} == {"64x128x96"}


def test_routing_is_measured_beside_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "CPU_SHAPES", ((32, 2, 64, 2, 4),))
    assert run.main(["routing", "--out", str(tmp_path), "--repeats", "2"]) == 0
    names = [row["case"].removeprefix("routing-") for row in csv.DictReader((tmp_path / "routing.csv").open())]
    permuting = ["indices", "permute", "permute-torch", "permute-codes", "pack"]
    assert names == [*permuting, "combine", "combine-torch"]


def test_nvfp4_measures_its_layers_beside_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_case, "CPU_SHAPES", ((64, 128, 96),))
    assert run.main(["nvfp4", "--out", str(tmp_path), "--repeats", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "nvfp4.csv").open()))
    assert [row["case"] for row in rows] == ["nvfp4-bf16", *(f"nvfp4-{name}" for name in nvfp4.LAYERS)]


def test_every_scaling_of_a_recipe_is_measured(small):
    used = {s for r in RECIPES.values() for g in (r.output, r.grad_input, r.grad_weight) for s in (g.lhs, g.rhs) if s}
    measured = {(s.element.name == "int8", s.block) for s in registry.CASTS.values()}
    assert {(s.element.name == "int8", s.block) for s in used} == measured


def test_bytes_that_a_cast_must_move(small):
    cases = {case.name: case.bytes_moved for case in registry.scaled_cast_cases(torch.device("cpu"))}
    elements, rows, columns = 256 * 512, 256, 512
    assert cases["copy"] == 4 * elements
    assert cases["scaled_cast-rowwise"] == 3 * elements + 4 * rows
    assert cases["scaled_cast-rowwise-of-t"] == 5 * elements + 4 * columns
    assert cases["scaled_cast-rowwise-both"] == 6 * elements + 4 * (rows + columns)
    assert cases["scaled_cast-tensorwise"] == 5 * elements + 4
    assert cases["scaled_cast-1x128-both"] == 4 * elements + 2 * 4 * elements / 128
    assert cases["scaled_cast-mxfp8-both"] == 4 * elements + 2 * elements / 32


def test_moe_measures_our_recipes_beside_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "CPU_SHAPES", ((256, 64, 96, 4),))
    assert run.main(["moe", "--out", str(tmp_path), "--repeats", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "moe.csv").open()))
    names = ["moe-bf16", *(f"moe-aotrain-{name}" for name in moe.MOE_RECIPES)]
    assert [row["case"] for row in rows][: len(names)] == names
    assert {row["shape"] for row in rows} == {"256x64x96x4"}


def test_uneven_groups_share_all_tokens_in_multiples_of_32():
    for experts in (1, 2, 8):
        ends = moe.uneven_offsets(1024, experts, torch.device("cpu"))
        sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
        assert (ends.dtype, ends[-1], len(ends)) == (torch.int32, 1024, experts)
        assert bool(((sizes > 0) & (sizes % 32 == 0)).all())


def test_fake_quantized_layers_keep_no_more_than_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_case, "CPU_SHAPES", ((32, 64, 96),))
    monkeypatch.setattr(qat.importlib.util, "find_spec", lambda name: None)
    eager = [case for case in qat.qat_cases(torch.device("cpu")) if case.group.endswith("eager")]
    assert [case.name for case in eager] == ["qat-bf16", "qat-aotrain-int4-g32", "qat-aotrain-8da4w"]
    for case in eager:
        case.check()
        assert case.bytes_kept == 2 * case.elements
