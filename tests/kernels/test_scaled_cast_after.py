"""scaled_cast_after: the bits of scaled_cast, and its place in a compiled training step."""

import pytest
import torch

from aotrain.formats import BLOCKWISE_128X128, FLOAT8_E4M3, ROWWISE, SCALE_FORMATS, TENSORWISE, Scaling
from aotrain.kernels import scaled_cast, scaled_cast_after
from aotrain.testing import assert_bitwise_equal

BLOCKS = {"tensorwise": TENSORWISE, "rowwise": ROWWISE, "128x128": BLOCKWISE_128X128}


def scaling(block: tuple[int, int]) -> Scaling:
    return Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32"], block=block)


@pytest.mark.parametrize("shape", [(37, 100), (0, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_bits_of_scaled_cast_whatever_comes_before(name: str, shape: tuple[int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    if x.numel():
        x[0, 0] = torch.nan
    for after in (None, torch.tensor(torch.inf), torch.zeros(0, 3)):
        for operand in (x, x.t()):
            spec = scaling(BLOCKS[name])
            got, want = scaled_cast_after(operand, spec, after), scaled_cast(operand, spec)
            assert_bitwise_equal(got.data, want.data)
            assert_bitwise_equal(got.scale, want.scale)
            assert got.scaling == want.scaling


@pytest.mark.parametrize("name", BLOCKS)
def test_opcheck(name: str):
    x, after = torch.randn(6, 40), torch.randn(3)
    for operand in (x, x.t()):
        torch.library.opcheck(
            torch.ops.aotrain.scaled_cast_after, (operand, after, "float8_e4m3fn", "float32", *BLOCKS[name])
        )


class Codes(torch.autograd.Function):
    """An identity of x whose backward casts x."""

    @staticmethod
    def forward(ctx, x, tied):
        ctx.save_for_backward(x)
        ctx.tied = tied
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        cast = scaled_cast_after(x.t(), scaling(ROWWISE), grad if ctx.tied else None)
        return grad * cast.scale.sum(), None


@pytest.mark.parametrize("tied", [True, False])
def test_a_compiler_computes_it_in_backward(tied: bool):
    torch.compiler.reset()
    x = torch.randn(64, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.compile(Codes.apply, fullgraph=True, backend="aot_eager")(x, tied)
    y.sum().backward()
    want = torch.autograd.grad(Codes.apply(x, False).sum(), x)[0]
    assert_bitwise_equal(x.grad, want)
    # Without the tie, what backward needs of the cast is computed in forward: the tie is what keeps it there.
    assert [t.data_ptr() == x.data_ptr() for t in kept] == [tied]
