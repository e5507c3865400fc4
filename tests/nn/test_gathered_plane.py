"""What a compiled graph gets of a gathered weight: the codes that are there when it runs, as a copy."""

import gc
import weakref

import pytest
import torch

from aotrain.formats import ScaledTensor, Scaling
from aotrain.kernels import scaled_cast
from aotrain.nn.gathered_plane import GatheredPlane, gathered_codes
from aotrain.nn.gathered_weight import GatheredWeight, planes_of
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal


class Fsdp:
    """A weight as FSDP2 gathers it: one plane in memory, another by a call."""

    def __init__(self, recipe: str, shape: tuple[int, int] = (6, 40)) -> None:
        self.recipe = RECIPES[recipe]
        self.planes = planes_of(self.recipe)
        self.values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.calls: list[Scaling] = []
        self.gathered = GatheredPlane(self.cast(self.planes.output), self.gather)
        self.weight = GatheredWeight(self.gathered, torch.bfloat16)

    def cast(self, scaling: Scaling) -> ScaledTensor:
        return scaled_cast(self.values, scaling)

    def gather(self, scaling: Scaling) -> ScaledTensor:
        self.calls.append(scaling)
        return self.cast(scaling)


def assert_same(got: ScaledTensor, want: ScaledTensor) -> None:
    assert got.scaling == want.scaling
    assert_bitwise_equal(got.data, want.data)
    assert_bitwise_equal(got.scale, want.scale)


@pytest.mark.parametrize("shape", [(6, 40), (1, 40), (6, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("recipe", ["float8_tensorwise", "float8_rowwise", "float8_blockwise", "int8_rowwise"])
def test_copies_of_what_casting_the_weight_would_give(recipe: str, shape: tuple[int, int]):
    fsdp = Fsdp(recipe, shape)
    scaling, scaling_t = fsdp.recipe.output.rhs, fsdp.recipe.grad_input.rhs
    output = gathered_codes(fsdp.weight, scaling, transposed=False)
    grad_input = gathered_codes(fsdp.weight, scaling_t, transposed=True, after=torch.ones(3))
    assert_same(output, scaled_cast(fsdp.values, scaling))
    assert_same(grad_input, scaled_cast(fsdp.values.t(), scaling_t))
    assert len(fsdp.calls) == len(fsdp.planes.distinct) - 1  # what is in memory is not gathered
    held = fsdp.gathered.q
    for copy in (output, grad_input):
        assert copy.data.is_contiguous()
        for own, other in ((copy.data, held.data), (copy.scale, held.scale)):
            assert not own.numel() or own.data_ptr() != other.data_ptr()


def test_the_same_graph_sees_each_gather_and_each_weight():
    torch.compiler.reset()
    scaling = RECIPES["float8_rowwise"].output.rhs
    codes = torch.compile(
        lambda weight: gathered_codes(weight, scaling, transposed=False)[:2], fullgraph=True, backend="aot_eager"
    )
    one, other = Fsdp("float8_rowwise"), Fsdp("float8_rowwise")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (1, -3, 5):
            for number, fsdp in enumerate((one, other)):
                fsdp.values = fsdp.values * (factor + number)
                fsdp.gathered.q = fsdp.cast(scaling)
                assert_same(ScaledTensor(*codes(fsdp.weight), scaling), fsdp.cast(scaling))
                assert not fsdp.calls
                # What is there is another plane.
                fsdp.gathered.q = fsdp.cast(fsdp.planes.grad_input)
                assert_same(ScaledTensor(*codes(fsdp.weight), scaling), fsdp.cast(scaling))
                assert fsdp.calls.pop() == scaling


def test_a_graph_that_looks_at_the_weight_sees_values():
    torch.compiler.reset()
    fsdp = Fsdp("float8_rowwise")
    norm = torch.compile(lambda weight: weight.float().norm(), fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(norm(fsdp.weight), fsdp.weight.float().norm())


def test_opcheck():
    fsdp = Fsdp("float8_rowwise")
    scaling = fsdp.planes.output
    for after in (None, torch.ones(2)):
        for transposed in (False, True):
            torch.library.opcheck(
                torch.ops.aotrain.gathered_codes,
                (
                    *(fsdp.gathered.handle, after, 6, 40, torch.device("cpu"), transposed),
                    *(scaling.element.name, scaling.scale.name, *scaling.block),
                ),
            )


def test_codes_that_fsdp2_has_freed():
    fsdp = Fsdp("float8_tensorwise")
    fsdp.gathered.q.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="after FSDP2 had freed it"):
        gathered_codes(fsdp.weight, fsdp.planes.output, transposed=False)


def test_a_handle_keeps_nothing_alive():
    fsdp = Fsdp("float8_tensorwise")
    handle, gathered = fsdp.gathered.handle, weakref.ref(fsdp.gathered)
    del fsdp
    gc.collect()
    assert gathered() is None
    assert handle.dtype == torch.int64
