"""Plans: what is decided for which layer, what it sums up to, and what the writer of a plan is told."""

import pytest
import torch
from torch import nn

from aotrain import Float8LinearConfig, conversion_report, convert_to_float8_training
from aotrain.gpus import GPUS
from aotrain.nn import make_plan
from aotrain.nn.filters import PUBLISHED_TOO_SMALL, _auto_filter_for_recipe, auto_filter_for_recipe
from aotrain.nn.layer_times import shard
from aotrain.nn.measure import Measured
from aotrain.nn.plan import MIN_GAIN, linear_shapes, times_for
from aotrain.nn.roofline import Roofline
from aotrain.nn.skips import matches_skip, skip_patterns
from aotrain.recipes import RECIPES
from tests.nn.models import LLAMA3_8B, LLAMA3_70B

SMALL_AND_LARGE = [("small", 1024, 1024), ("large", 8192, 8192)]


def test_small_layers_are_kept_and_large_ones_converted():
    plan = make_plan(SMALL_AND_LARGE, "rowwise", tokens=16384, gpu="H100")
    assert (plan.recipe, plan.kept, plan.converted) == ("float8_rowwise", ("small",), ("large",))
    small, large = plan.rows
    assert small.gain < MIN_GAIN <= large.gain
    assert small.planned_seconds == small.bf16_seconds
    assert large.planned_seconds == large.cast_seconds + large.gemm_seconds
    assert "saves" in large.reason
    assert "cost" in small.reason or "too small" in small.reason
    assert plan.linear_gain == pytest.approx(plan.bf16_seconds / (small.bf16_seconds + large.planned_seconds))
    assert 1 < plan.step_gain < plan.linear_gain < large.gain
    assert "convert 1 of 2" in plan.summary()


def test_the_share_of_the_rest_can_be_given():
    gains = [
        make_plan(SMALL_AND_LARGE, "rowwise", tokens=16384, gpu="H100", other_share=share) for share in (0, 0.5, 0.9)
    ]
    assert gains[0].step_gain == pytest.approx(gains[0].linear_gain)
    assert gains[1].step_gain == pytest.approx(1 / (0.5 + 0.5 / gains[0].linear_gain))
    assert gains[2].other_share == pytest.approx(0.9)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_an_error(share):
    with pytest.raises(ValueError, match="other_share got"):
        make_plan(SMALL_AND_LARGE, "rowwise", tokens=16384, gpu="H100", other_share=share)


def test_more_tokens_gain_more():
    gains = [make_plan(LLAMA3_8B, "float8_rowwise", tokens=tokens, gpu="H100") for tokens in (512, 4096, 32768)]
    assert gains[0].linear_gain <= gains[1].linear_gain < gains[2].linear_gain
    assert gains[0].linear_gain == 1
    assert gains[0].precision() == {"recipe": None}
    (advice,) = gains[0].advice()
    assert "less than 3 %" in advice


def test_tensor_parallel_shards_gain_less():
    plans = [make_plan(LLAMA3_8B, "float8_rowwise", tokens=8192, tp=tp, gpu="H100") for tp in (1, 8)]
    assert plans[1].linear_gain < plans[0].linear_gain
    assert len(plans[1].converted) < len(plans[0].converted)
    assert all(new.bf16_seconds < old.bf16_seconds for old, new in zip(plans[0].rows, plans[1].rows, strict=True))


@pytest.mark.parametrize(
    ("fqn", "sharded"),
    [
        ("layers.0.attention.wq", (1024, 4096)),
        ("layers.0.attention.wo", (4096, 1024)),
        ("model.layers.3.mlp.down_proj", (4096, 1024)),
        ("model.layers.3.mlp.gate_proj", (1024, 4096)),
        ("layers.0.moe.router.gate", (4096, 4096)),
        ("lm_head", (1024, 4096)),
    ],
)
def test_shards_divide_n_or_k(fqn, sharded):
    assert shard((fqn, 4096, 4096), 4) == (fqn, *sharded)
    assert shard((fqn, 4096, 4096), 1) == (fqn, 4096, 4096)
    assert shard(("wq", 10, 10), 4) == ("wq", 3, 10)


def test_a_module_on_the_meta_device_is_planned_and_converted_by_its_plan():
    with torch.device("meta"):
        shared = nn.Linear(8192, 8192)
        model = nn.Sequential(nn.Linear(8192, 1024), nn.ReLU(), shared, nn.Sequential(shared, nn.Linear(8192, 8192)))
    assert linear_shapes(model) == [("0", 1024, 8192), ("2", 8192, 8192), ("3.1", 8192, 8192)]
    plan = make_plan(model, "float8_rowwise", tokens=16384, gpu="H100")
    convert_to_float8_training(
        model, module_filter_fn=plan.filter, config=Float8LinearConfig.from_recipe_name("rowwise")
    )
    assert conversion_report(model).converted == plan.converted == ("2", "3.1")


@pytest.mark.parametrize(
    ("gpu", "recipe", "words"),
    [
        ("A100", "float8_rowwise", ["does not run natively", "A100 has compute capability 8.0", "Use int8_rowwise."]),
        ("RTX 4090", "float8_rowwise", ["needs 9.0", "float8_tensorwise or int8_rowwise"]),
        ("B200", "float8_blockwise", ["no product with a scale per 128 elements", "float8_rowwise"]),
        ("H100", "mxfp8", ["does not run natively", "MX products are emulated on H100", "float8_rowwise"]),
        ("B200", "mxfp4", ["MX products are emulated on B200 as far as its data sheet tells", "float8_rowwise"]),
        ("MI300X", "float8_blockwise", ["(1, 128)", "float8_rowwise"]),
        ("H100", "nvfp4", ["nvfp4 is not planned", "H100 has no NVFP4 products, B200 has", "Use float8_tensorwise"]),
        ("MI300X", "nvfp4", ["MI300X has no NVFP4 products"]),
        ("B200", "nvfp4", ["not timed yet", "benchmarks.run nvfp4", "Use float8_tensorwise"]),
    ],
)
def test_a_gpu_that_cannot_run_the_recipe_says_so_and_names_what_it_can(gpu, recipe, words):
    plan = make_plan(LLAMA3_8B, recipe, tokens=8192, gpu=gpu)
    (advice,) = plan.advice()
    for word in words:
        assert word in advice
    assert plan.converted == ()
    assert plan.step_gain == 1
    assert all(row.gain == 1 and row.bf16_seconds > 0 for row in plan.rows)


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090", "H100"])
def test_int8_gains_on_cards_without_float8_and_with_it(gpu):
    assert make_plan(LLAMA3_8B, "int8_rowwise", tokens=8192, gpu=gpu).step_gain > MIN_GAIN


def test_casts_without_a_kernel_are_named():
    assert make_plan(LLAMA3_8B, "float8_rowwise", tokens=8192, gpu="H100").advice() == []
    plan = make_plan(LLAMA3_8B, "int8_rowwise", tokens=8192, gpu="A100")
    assert plan.advice() == Roofline(GPUS["A100"]).notes(RECIPES["int8_rowwise"])


def test_experts_are_left_out_and_the_plan_says_so():
    plan = make_plan([*SMALL_AND_LARGE, ("layers.0.moe.router.gate", 128, 2048)], "rowwise", tokens=16384, gpu="H100")
    assert "not part of this plan" in plan.advice()[0]


def test_quantized_inputs_save_a_cast_where_codes_can_be_transposed():
    plans = [
        make_plan(LLAMA3_8B, "float8_tensorwise", tokens=8192, gpu="H100", save_for_backward=save)
        for save in ("high_precision", "quantized")
    ]
    assert plans[1].rows[1].cast_seconds < plans[0].rows[1].cast_seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "rowise"}, "Unknown recipe"),
        ({"gpu": "H1000"}, "did you mean 'H100'"),
        ({"tokens": 0}, "tokens got 0"),
        ({"tp": 0}, "tp got 0"),
        ({"skip": ["head"]}, "'head' matches no linear layer"),
        ({"model": []}, "no linear layer"),
    ],
)
def test_mistakes(arguments, message):
    call = {"model": SMALL_AND_LARGE, "recipe": "rowwise", "tokens": 16384, "gpu": "H100"} | arguments
    with pytest.raises(ValueError, match=message):
        make_plan(call.pop("model"), call.pop("recipe"), **call)


def test_without_a_gpu_or_a_name_the_plan_is_for_h100():
    times = times_for(None)
    if torch.cuda.is_available():
        assert isinstance(times, Measured)
    else:
        assert times.label == "H100, modelled from its data sheet"


# Skip lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "converted", "patterns"),
    [
        (["lm_head"], ["layers.0.w1"], ["lm_head"]),
        (["layers.0.wo", "layers.1.wo"], ["layers.0.w1", "layers.1.w1"], ["layers.*.wo"]),
        (["layers.0.wo"], ["layers.1.wo"], ["layers.0.wo"]),
        (["layers.1.w1"], ["layers.1.w13", "layers.11.w1"], ["layers.1.w[1]"]),
        ([], ["lm_head"], []),
    ],
)
def test_skip_patterns_match_what_is_kept_and_nothing_else(kept, converted, patterns):
    assert skip_patterns(kept, converted) == patterns
    for fqn in kept:
        assert any(matches_skip(fqn, pattern) for pattern in patterns)
    for fqn in converted:
        assert not any(matches_skip(fqn, pattern) for pattern in patterns)


def test_the_precision_section_of_a_large_model_is_short():
    plan = make_plan(LLAMA3_70B, "float8_rowwise", tokens=32768, tp=8, gpu="H100", skip=["lm_head"])
    section = plan.precision()
    assert section["recipe"] == "float8_rowwise"
    assert section["skip"][0] == "lm_head"
    assert 1 < len(section["skip"]) <= 3
    assert plan.rows[0].reason == "matches skip 'lm_head'"


# Filters -------------------------------------------------------------------------------------------------------------


class LinearConfig:
    def __init__(self, n: int, k: int) -> None:
        self.out_features, self.in_features = n, k


@pytest.mark.parametrize("recipe", ["float8_blockwise", "int8_rowwise", "blockwise"])
def test_recipes_without_published_sizes_are_judged_by_the_model(recipe):
    keep = auto_filter_for_recipe(recipe, ["lm_head"])
    assert keep(LinearConfig(8192, 8192), "w1")
    assert not keep(LinearConfig(256, 256), "w1")
    assert not keep(LinearConfig(8200, 8192), "w1")
    assert not keep(LinearConfig(8192, 8192), "lm_head")


def test_a_named_gpu_is_modelled_for_every_recipe():
    assert auto_filter_for_recipe("rowwise_with_gw_hp", gpu="H100")(LinearConfig(8192, 8192), "w1")
    assert not auto_filter_for_recipe("rowwise", gpu="H100", tokens=128)(LinearConfig(8192, 8192), "w1")
    with pytest.raises(ValueError, match=r"A100 has compute capability 8\.0.*int8_rowwise"):
        auto_filter_for_recipe("rowwise", gpu="A100")


def test_the_name_used_elsewhere_is_the_same_function():
    assert _auto_filter_for_recipe is auto_filter_for_recipe
    assert set(PUBLISHED_TOO_SMALL) == {"float8_tensorwise", "float8_rowwise"}
