"""convert_moe_training: what is intercepted and what is not, what survives copies, and what is reported."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint

from aotrain.nn import (
    Float8Linear,
    Float8LinearConfig,
    NVFP4TrainingConfig,
    conversion_report,
    convert_moe_training,
    convert_to_float8_training,
    unconvert,
)
from aotrain.nn.experts import expert_scaling
from aotrain.nn.grouped_mm_mode import GroupedMMInterception
from aotrain.ops import nvfp4_grouped_mm, scaled_grouped_mm
from aotrain.ops.nvfp4_linear import DEFAULT_SIGNS
from aotrain.recipes import get_recipe
from aotrain.testing import assert_bitwise_equal
from tests.nn.experts import BiasedExperts, Experts, ListedExperts, LoopedExperts, MoE, rows

RECIPES = ["float8_rowwise", "float8_blockwise"]


class ScaledExperts(Experts):
    """What a converted `Experts` must compute, written out."""

    recipe = get_recipe("float8_rowwise")

    def multiply(self, x, weight, offs):
        return scaled_grouped_mm(x, weight, offs, self.recipe)


class FunctionalExperts(Experts):
    def multiply(self, x, weight, offs):
        return nn.functional.grouped_mm(x, weight, offs=offs)


class OverloadExperts(Experts):
    def multiply(self, x, weight, offs):
        return torch.ops.aten._grouped_mm.default(x, weight, offs)


class KeywordExperts(Experts):
    def multiply(self, x, weight, offs):
        return torch._grouped_mm(x, mat2=weight, offs=offs)


class CopyingExperts(Experts):
    """A weight that is sliced, detoured through float16 and given a low-rank addition is still the parameter."""

    def multiply(self, x, weight, offs):
        delta = torch.zeros(4, weight.shape[1], 1, dtype=weight.dtype) @ torch.zeros(
            4, 1, weight.shape[2], dtype=weight.dtype
        )
        whole = torch.cat(tensors=[weight[:2], weight[2:]]).clone().contiguous() + delta
        return torch._grouped_mm(x, whole, offs=offs)


def train_once(module: nn.Module, x: torch.Tensor, *args: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient and parameter gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, *args)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("cls", [Experts, FunctionalExperts, OverloadExperts, KeywordExperts, CopyingExperts])
def test_grouped_products_on_own_weights_run_in_the_recipe(cls: type[Experts], recipe: str):
    torch.manual_seed(0)
    experts = cls()
    reference = ScaledExperts()
    reference.recipe = get_recipe(recipe)
    reference.load_state_dict(experts.state_dict())
    plain = train_once(experts, *rows())
    torch.manual_seed(0)
    inputs = rows()
    assert convert_moe_training(experts, recipe) is experts
    got = train_once(experts, *inputs)
    assert_same(got, train_once(reference, *inputs))
    assert not torch.equal(got[0], plain[0])
    assert type(experts).__name__ == f"LowPrecision{cls.__name__}"
    assert isinstance(experts, cls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype):
    experts, inputs = Experts(dtype=dtype), rows()
    reference = ScaledExperts(dtype=dtype)
    reference.load_state_dict(experts.state_dict())
    convert_moe_training(experts)
    assert_same(train_once(experts, *inputs), train_once(reference, *inputs))


@pytest.mark.parametrize("sizes", [{"dim": 24, "hidden": 40}, {"dim": 133, "hidden": 7}], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_that_are_no_multiple_of_a_block(sizes: dict[str, int], recipe: str):
    experts, inputs = Experts(**sizes), rows(dim=sizes["dim"])
    reference = ScaledExperts(**sizes)
    reference.recipe = get_recipe(recipe)
    reference.load_state_dict(experts.state_dict())
    got = train_once(convert_moe_training(experts, recipe), *inputs)
    assert all(torch.isfinite(tensor).all() for tensor in got)
    assert_same(got, train_once(reference, *inputs))


class ScaledBiasedExperts(ScaledExperts, BiasedExperts):
    pass


class ScaledListedExperts(ListedExperts):
    def forward(self, x, offs):
        for weight in self.weights:
            x = scaled_grouped_mm(x.bfloat16(), weight.bfloat16(), offs, get_recipe("float8_rowwise"))
        return x


@pytest.mark.parametrize(
    ("cls", "scaled"), [(BiasedExperts, ScaledBiasedExperts), (ListedExperts, ScaledListedExperts)]
)
def test_biases_and_parameter_lists(cls: type[nn.Module], scaled: type[nn.Module]):
    experts, reference, inputs = cls(), scaled(), rows()
    reference.load_state_dict(experts.state_dict())
    assert_same(train_once(convert_moe_training(experts), *inputs), train_once(reference, *inputs))


def test_grouped_products_on_other_tensors_pass_through():
    class Mixed(Experts):
        def forward(self, x, offs, other):
            own = torch._grouped_mm(x.bfloat16(), self.up.bfloat16().mT, offs=offs)
            # Shaped like the weight, but not the weight.
            foreign = torch._grouped_mm(x.bfloat16(), other, offs=offs)
            # The product of a weight gradient has two matrices.
            flat = torch._grouped_mm(own.t(), x.bfloat16(), offs=offs)
            return own, foreign, flat

    experts = Mixed()
    (x, offs), other = rows(), torch.randn(4, 32, 48).bfloat16()
    plain = experts(x, offs, other)
    own, foreign, flat = convert_moe_training(experts)(x, offs, other)
    assert not torch.equal(own, plain[0])
    assert_bitwise_equal(foreign, plain[1])
    assert_bitwise_equal(flat, torch._grouped_mm(own.t(), x.bfloat16(), offs=offs))
    # And nothing is left behind for the next grouped product of anyone.
    assert_bitwise_equal(torch._grouped_mm(x.bfloat16(), experts.up.bfloat16().mT, offs=offs), plain[0])


def test_parameters_state_dict_and_optimizer_stay_the_same():
    model = MoE(Experts())
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert convert_moe_training(model) is model
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert type(model.gate) is type(model.lm_head) is nn.Linear
    x, target = torch.randn(64, 32), torch.randint(16, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert "LowPrecisionExperts(output=(float8_e4m3fn" in repr(model)
    report = conversion_report(model)
    assert report.converted == ("experts",)
    assert "MoE training: converted 1 experts modules" in str(report)
    assert "float8_rowwise, up (4, 48, 32), down (4, 32, 48)" in str(report)


def test_order_with_float8_linear_layers_does_not_matter():
    torch.manual_seed(0)
    one, other, x = MoE(Experts()), MoE(Experts()), torch.randn(16, 32)
    other.load_state_dict(one.state_dict())
    linear = functools.partial(
        convert_to_float8_training,
        module_filter_fn=lambda mod, fqn: fqn == "lm_head",
        config=Float8LinearConfig.from_recipe_name("rowwise"),
    )
    convert_moe_training(linear(one))
    linear(convert_moe_training(other))
    for model in (one, other):
        assert type(model.lm_head) is Float8Linear
        assert type(model.gate) is nn.Linear
        assert expert_scaling(model.experts) is not None
    assert_same(train_once(one, x), train_once(other, x))


def test_unconvert_restores_both_kinds_of_layers():
    torch.manual_seed(0)
    model, x = MoE(Experts()), torch.randn(16, 32)
    want, parameters = train_once(model, x), list(model.parameters())
    convert_to_float8_training(convert_moe_training(model), config=Float8LinearConfig.from_recipe_name("rowwise"))
    assert not torch.equal(train_once(model, x)[0], want[0])
    assert unconvert(model) is model
    assert type(model.experts) is Experts
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_same(train_once(model, x), want)
    with pytest.raises(ValueError, match=r"no Float8Linear, MXLinear or NVFP4Linear and no converted experts"):
        unconvert(model)


def clone_by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def clone_by_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_save])
def test_copies_are_converted_and_independent(clone):
    experts, inputs = convert_moe_training(Experts()), rows()
    other = clone(experts)
    assert type(other) is type(experts)
    assert other.up is not experts.up
    assert_same(train_once(other, *inputs), train_once(experts, *inputs))
    unconvert(other)
    assert type(other) is Experts
    assert expert_scaling(experts) is not None


class LowRank(nn.Module):
    """An adapter: the weight and a product of two thin matrices."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 48, 2) * 0.1)
        self.b = nn.Parameter(torch.randn(4, 2, 32) * 0.1)

    def forward(self, weight):
        return weight + self.a @ self.b


def test_adapters_on_the_weights_are_part_of_them():
    experts, inputs = convert_moe_training(Experts()), rows()
    merged = copy.deepcopy(experts)
    register_parametrization(experts, "up", LowRank())
    adapter = experts.parametrizations.up[0]
    with torch.no_grad():
        merged.up += adapter.a @ adapter.b
    want = train_once(merged, *inputs)
    got = experts(*inputs)
    assert_bitwise_equal(got.detach(), want[0])
    got.sum().backward()
    assert adapter.a.grad.count_nonzero() > 0
    remove_parametrizations(experts, "up")  # which registers the merged weight anew, as the last parameter
    assert_same(train_once(experts, *inputs)[:2], want[:2])


def test_another_recipe_replaces_the_first():
    experts, inputs = convert_moe_training(Experts(), "rowwise"), rows()
    fresh = copy.deepcopy(unconvert(copy.deepcopy(experts)))
    convert_moe_training(experts, "float8_blockwise")
    assert type(experts).__mro__[1] is Experts
    assert_same(train_once(experts, *inputs), train_once(convert_moe_training(fresh, "float8_blockwise"), *inputs))


def test_recipes_configurations_and_emulation():
    for recipe in ("rowwise", get_recipe("rowwise"), Float8LinearConfig.from_recipe_name("rowwise")):
        assert expert_scaling(convert_moe_training(Experts(), recipe)).recipe == get_recipe("rowwise")
    assert expert_scaling(convert_moe_training(Experts(), Float8LinearConfig(emulate=True))).emulate
    assert expert_scaling(convert_moe_training(Experts(), emulate=True)).emulate
    with pytest.raises(ValueError, match="Unknown recipe 'float9'"):
        convert_moe_training(Experts(), "float9")
    with pytest.raises(TypeError, match=r"got recipe=8; want the name of a recipe, a LinearRecipe"):
        convert_moe_training(Experts(), 8)


def test_meta_models_are_converted_before_they_have_values():
    with torch.device("meta"):
        model = convert_moe_training(MoE(Experts()))
    model.to_empty(device="cpu")
    source = MoE(Experts())
    model.load_state_dict(source.state_dict())
    x = torch.randn(16, 32)
    assert_same(train_once(model, x), train_once(convert_moe_training(source), x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_in_the_recipe(reentrant: bool):
    experts, inputs = convert_moe_training(Experts()), rows()
    want = train_once(experts, *inputs)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x, offs):
            return checkpoint(self.experts, x, offs, use_reentrant=reentrant)

    assert_same(train_once(Checkpointed(), *inputs), want)


def test_hooks_and_keyword_arguments_reach_the_module():
    experts, (x, offs) = Experts(), rows()
    seen = []
    experts.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    out = convert_moe_training(experts)(x=x, offs=offs)
    assert seen == [out.shape]


def test_a_module_without_a_grouped_product_is_no_silent_no_op():
    model = convert_moe_training(MoE(LoopedExperts()))
    x = torch.randn(16, 32)
    with pytest.raises(RuntimeError, match=r"experts \(LowPrecisionLoopedExperts\) .* called no grouped GEMM; want"):
        model(x)
    with torch.no_grad():  # nothing is trained
        assert model(x).shape == (16, 16)
    assert model.eval()(x).shape == (16, 16)

    class Foreign(Experts):
        def forward(self, x, offs):
            return torch._grouped_mm(x, torch.ones(4, 32, 48), offs=offs)

    with pytest.raises(RuntimeError, match="called 1 grouped GEMMs on other tensors"):
        convert_moe_training(Foreign())(*rows())


def test_no_rows_are_no_mistake():
    experts = convert_moe_training(LoopedExperts())
    assert experts(torch.zeros(0, 32), torch.zeros(4, dtype=torch.int32)).shape == (0, 32)
    experts = convert_moe_training(Experts())
    out = experts(torch.zeros(0, 32), torch.zeros(4, dtype=torch.int32))
    out.sum().backward()
    assert experts.up.grad.count_nonzero() == 0


def test_rows_past_the_last_group_are_zero():
    experts = convert_moe_training(Experts())
    x, offs = rows()
    x = torch.cat([x, torch.full((5, 32), float("nan"))])
    assert (experts(x, offs)[20:] == 0).all()


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 8, 4))


class Mixed(nn.Module):
    """Experts among other modules with 3-D parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.positions = Positions()
        self.first, self.second = Experts(), Experts()


def test_default_choice_filter_and_report():
    model = convert_moe_training(Mixed())
    report = conversion_report(model)
    assert report.converted == ("first", "second")
    assert report.skipped == {
        "conv": "Conv1d has no grouped GEMM",
        "positions": "a single group; name it with module_filter_fn if it is an expert",
    }
    model = convert_moe_training(Mixed(), module_filter_fn=lambda mod, fqn: fqn == "second")
    assert conversion_report(model).converted == ("second",)
    assert conversion_report(model).skipped["first"] == "rejected by the filter"
    assert type(model.first) is Experts


def test_nothing_to_convert_is_an_error_that_names_what_was_seen():
    with pytest.raises(
        ValueError, match=r"(?s)converted none of the 4 modules .*second: rejected by the filter.*Check"
    ):
        convert_moe_training(Mixed(), module_filter_fn=lambda mod, fqn: False)
    with pytest.raises(ValueError, match=r"no module with 3-D parameters .* among Linear, Sequential\. Experts that"):
        convert_moe_training(nn.Sequential(nn.Linear(4, 4)))
    hooked = Experts()
    hooked.forward = hooked.forward
    with pytest.raises(ValueError, match="its forward was replaced on the instance; convert before that"):
        convert_moe_training(hooked)


def test_distributed_tensors_in_the_product_are_refused():
    x, offs = rows()
    weight = torch.randn(4, 32, 48)
    weight.device_mesh = None  # what a DTensor is known by
    mode = GroupedMMInterception([weight], get_recipe("rowwise"))
    with pytest.raises(ValueError, match=r"got a DTensor; want the tensors of this rank"), mode:
        torch._grouped_mm(x, weight, offs=offs)


@pytest.mark.parametrize("recipe", ["nvfp4", NVFP4TrainingConfig(rht_sign_vector=DEFAULT_SIGNS)])
def test_experts_in_nvfp4_are_those_of_its_grouped_product(recipe):
    torch.manual_seed(0)
    experts = Experts()
    x, offs = rows()
    x = x.bfloat16().requires_grad_()
    hidden = nvfp4_grouped_mm(x, experts.up.bfloat16().mT, offs).relu()
    want = nvfp4_grouped_mm(hidden, experts.down.bfloat16().mT, offs)
    convert_moe_training(experts, recipe)
    assert_bitwise_equal(experts(x, offs), want)
    assert "nvfp4" in repr(experts)


def test_a_recipe_that_groups_cannot_have_is_refused_at_once():
    with pytest.raises(ValueError, match="groups of rows cannot"):
        convert_moe_training(Experts(), "mxfp4")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [*RECIPES, "mxfp8"])
def test_nothing_waits_for_the_gpu(recipe: str):
    model = convert_moe_training(Experts(dim=128, hidden=256).cuda(), recipe)
    x = torch.randn(96, 128, device="cuda", requires_grad=True)
    offs = torch.tensor([40, 40, 71, 96], dtype=torch.int32, device="cuda")
    model(x, offs).square().mean().backward()  # kernels are compiled by their first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, offs).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
