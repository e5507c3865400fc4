"""The list of casts and products that a plan counts for experts against those of a real forward and backward."""

import importlib

import pytest
import torch

from aotrain.gpus import GPUS
from aotrain.nn import make_plan
from aotrain.nn.expert_work import Experts, grouped_casts, grouped_gemms
from aotrain.nn.layer_times import layer_seconds, shard
from aotrain.nn.linear_work import Cast
from aotrain.nn.measure import Measured
from aotrain.nn.roofline import TILE_ROWS, Roofline
from aotrain.ops import scaled_grouped_mm
from aotrain.recipes import RECIPES

module = importlib.import_module("aotrain.ops.scaled_grouped_mm")
M, N, K, E = 48, 32, 16, 3
SCOUT = Experts("moe.experts", (("w1", 8192, 5120), ("w2", 5120, 8192), ("w3", 8192, 5120)), 4, 1)
SMALL = Experts("moe.experts", (("w1", 768, 2048), ("w2", 2048, 768), ("w3", 768, 2048)), 128, 8)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "fp4" not in name])
def test_casts_and_products_are_those_of_scaled_grouped_mm(monkeypatch, recipe):
    casts, products = [], []

    def record(name, describe, calls):
        real = getattr(module, name)

        def call(*arguments, **options):
            calls.append(describe(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    record("grouped_cast", lambda x, layout, scaling: Cast(*x.shape, scaling, False), casts)
    record("grouped_cast_both", lambda x, layout, s, s_t: Cast(*x.shape, s, False, s_t), casts)
    record("grouped_cast_t", lambda x, layout, scaling: Cast(*x.shape[::-1], scaling, True), casts)
    record("scaled_cast", lambda w, s: Cast(w.shape[0] * w.shape[1], w.shape[2], s, not w.is_contiguous()), casts)
    record("scaled_product", lambda a, b, *rest: (len(a.data), b.data.shape[1], b.data.shape[2]), products)
    record("scaled_grouped_mm_contracted", lambda a, b, layout, dtype: (len(a.data), len(b.data), M), products)
    x = torch.randn(M, K, requires_grad=True)
    weight = torch.randn(E, N, K, requires_grad=True)
    offsets = torch.tensor([16, 16, M], dtype=torch.int32)
    scaled_grouped_mm(x, weight.mT, offsets, RECIPES[recipe]).backward(torch.randn(M, N))
    assert casts == list(grouped_casts(M, N, K, E, RECIPES[recipe]))
    gemms = grouped_gemms(M, N, K, E, RECIPES[recipe])
    assert products == [(g.rows, g.columns, g.contracted) for g in gemms if g.recipe.quantized]
    assert [(g.groups, g.divided) for g in gemms] == [(E, "rows"), (E, "rows"), (E, "contracted")]


def test_large_experts_are_converted_and_small_ones_kept():
    large = make_plan([SCOUT], "float8_rowwise", tokens=131072, gpu="H200")
    small = make_plan([SMALL], "float8_rowwise", tokens=16384, gpu="H200")
    assert large.converted == ("moe.experts",)
    assert small.kept == ("moe.experts",)
    assert large.rows[0].gain > 1.1 > 1 > small.rows[0].gain
    assert (small.rows[0].experts, small.rows[0].n, small.rows[0].k) == (128, 768, 2048)
    assert "experts" not in " ".join(small.notes)


def test_few_rows_per_expert_fill_tiles_badly():
    times = Roofline(GPUS["H200"])
    one = Experts("e", (("w", 2048, 2048),), 64, 1)
    full, half = (layer_seconds(one, 64 * rows, None, times)[1] for rows in (TILE_ROWS, TILE_ROWS // 2))
    output = [times.gemm(grouped_gemms(64 * rows, 2048, 2048, 64, None)[0]) for rows in (TILE_ROWS, TILE_ROWS // 2)]
    assert output[0] < 1.2 * output[1]
    assert half < full


def test_ranks_share_experts_and_their_sizes():
    assert shard(SMALL, 1, 8).experts == 16
    assert shard(SMALL, 1, 3).experts == 43
    assert shard(Experts("e", (("w1_EFD", 768, 2048), ("w2_EDF", 2048, 768)), 8, 2), 2) == Experts(
        "e", (("w1_EFD", 384, 2048), ("w2_EDF", 2048, 384)), 8, 2
    )
    spread, whole = (make_plan([SMALL], "rowwise", tokens=16384, gpu="H200", ep=ep) for ep in (8, 1))
    assert spread.bf16_seconds < whole.bf16_seconds
    with pytest.raises(ValueError, match="ep got 0"):
        make_plan([SMALL], "rowwise", tokens=16384, gpu="H200", ep=0)


def test_experts_are_measured_group_by_group(tmp_path):
    times = Measured(torch.device("cpu"), folder=tmp_path)
    tiny = Experts("e", (("w", 48, 32),), 3, 2)
    for recipe in (None, RECIPES["float8_rowwise"], RECIPES["float8_rowwise_with_gw_hp"], RECIPES["float8_blockwise"]):
        casts, products = layer_seconds(tiny, 20, recipe, times)
        assert products > 0
        assert (casts > 0) == (recipe is not None)
    assert sum("3 groups of rows" in key for key in times.path.read_text().splitlines()) > 3


def test_a_job_gets_recipes_of_layers_and_experts_and_one_skip_list():
    wide = [("layers.0.wq", 8192, 8192), ("layers.0.wo", 64, 64)]
    both = make_plan([*wide, SCOUT], "float8_rowwise", tokens=131072, gpu="H200")
    assert both.precision() == {"recipe": "float8_rowwise", "experts": "float8_rowwise", "skip": ["layers.*.wo"]}
    linears = make_plan([wide[0], SMALL], "float8_rowwise", tokens=16384, gpu="H200")
    assert linears.precision() == {"recipe": "float8_rowwise", "experts": None, "skip": []}
    experts = make_plan([wide[1], SCOUT], "float8_rowwise", tokens=131072, gpu="H200")
    assert experts.precision() == {"recipe": None, "experts": "float8_rowwise", "skip": []}
