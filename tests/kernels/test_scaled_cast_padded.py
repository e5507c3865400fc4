"""Casts with `pad`: the bits of quantizing x with zeros up to the multiples, by every implementation."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaledTensor,
    Scaling,
    quantize,
    scale_shape,
)
from aotrain.formats.scaling import Block
from aotrain.kernels import scaled_cast, scaled_cast_both
from aotrain.kernels._padding import Multiples, padded_shape
from aotrain.kernels.scaled_cast import _cuda, _cuda_both
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

BLOCKS = [TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, BLOCKWISE_128X128]
SHAPES = [(37, 100), (1, 17), (16, 16), (129, 130), (0, 5), (5, 0), (2, 3, 31)]
# Multiples of x and of its transposition, each in its own coordinates, as products take them and others.
PADS = [((1, 16), (16, 16)), ((4, 128), (16, 128)), ((32, 8), (8, 1))]


def _zeros_after(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return F.pad(x, (0, shape[-1] - x.shape[-1], 0, shape[-2] - x.shape[-2]))


def _expected(x: torch.Tensor, scaling: Scaling, pad: Multiples, amax: torch.Tensor | None = None) -> ScaledTensor:
    rows, columns = (-(-size // multiple) * multiple for size, multiple in zip(x.shape[-2:], pad, strict=True))
    padded = _zeros_after(x.contiguous(), (rows, columns))
    if amax is not None:
        amax = _zeros_after(amax, scale_shape(padded.shape, scaling.block))
    return quantize(padded, scaling, amax=amax)


def _assert_equal(data: torch.Tensor, scale: torch.Tensor, expected: ScaledTensor) -> None:
    assert_bitwise_equal(data.cpu(), expected.data, what="data")
    assert_bitwise_equal(scale.cpu(), expected.scale, what="scale")
    assert data.is_contiguous()
    assert scale.is_contiguous()


def _one_on_cpu(x: torch.Tensor, scaling: Scaling, pad: Multiples, amax: torch.Tensor | None = None):
    return scaled_cast(x, scaling, amax=amax, pad=pad)[:2]


def _one_as_on_a_gpu(x: torch.Tensor, scaling: Scaling, pad: Multiples, amax: torch.Tensor | None = None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _cuda(x, scaling.element.name, scaling.scale.name, *scaling.block, amax, pad)


def _assert_both(x: torch.Tensor, scaling: Scaling, scaling_t: Scaling, pads: tuple[Multiples, Multiples]) -> None:
    expected, expected_t = _expected(x, scaling, pads[0]), _expected(x.mT, scaling_t, pads[1])
    names = [(s.element.name, s.scale.name, *s.block) for s in (scaling, scaling_t)]
    on_cpu = scaled_cast_both(x, scaling, scaling_t, pad=pads[0], pad_t=pads[1])
    for data, scale, data_t, scale_t in ((*on_cpu[0][:2], *on_cpu[1][:2]), _cuda_both(x, *names[0], *names[1], *pads)):
        _assert_equal(data, scale, expected)
        _assert_equal(data_t, scale_t, expected_t)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("cast", [_one_on_cpu, _one_as_on_a_gpu])
def test_one_cast(cast, block: Block, shape: tuple[int, ...]) -> None:
    scaling = Scaling(element=FLOAT8_E4M3, block=block)
    for x, pad in ((torch.randn(shape), (16, 16)), (torch.randn(shape).mT, (4, 128))):
        _assert_equal(*cast(x, scaling, pad), _expected(x, scaling, pad))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("cast", [_one_on_cpu, _one_as_on_a_gpu])
def test_given_amax(cast, block: Block) -> None:
    scaling = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=block)
    for x in (adversarial_matrix(37, 100), adversarial_matrix(130, 37).t()):
        amax = torch.rand(scale_shape(x.shape, block)) * 4
        for pad in ((16, 16), (128, 128)):
            _assert_equal(*cast(x, scaling, pad, amax), _expected(x, scaling, pad, amax))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("block", "block_t"), [(b, b) for b in BLOCKS] + [(ROWWISE, TENSORWISE)], ids=str)
def test_both_ways(block: Block, block_t: Block, shape: tuple[int, ...]) -> None:
    pair = Scaling(element=FLOAT8_E4M3, block=block), Scaling(element=FLOAT8_E4M3, block=block_t)
    for pads in PADS[:2]:
        _assert_both(torch.randn(shape), *pair, pads)
    _assert_both(torch.randn(shape).mT, *pair, PADS[2])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8], ids=lambda element: element.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_non_finite_blocks_give_the_padding_of_the_definition(element, dtype: torch.dtype) -> None:
    x = torch.randn(37, 100)
    x[3, 5], x[20, 7], x[21, 8] = torch.nan, torch.inf, -torch.nan
    for block in BLOCKS:
        scaling = Scaling(element=element, scale=SCALE_FORMATS["float32_pow2"], block=block)
        _assert_both(x.to(dtype), scaling, scaling, PADS[0])
        _assert_equal(*_one_as_on_a_gpu(x.to(dtype), scaling, (16, 16)), _expected(x.to(dtype), scaling, (16, 16)))


@pytest.mark.usefixtures("interpreter")
def test_rows_longer_than_a_tile() -> None:
    x, scaling = torch.randn(2, 16384 + 3), Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    _assert_equal(*_one_as_on_a_gpu(x, scaling, (1, 16)), _expected(x, scaling, (1, 16)))
    x = x[:, :16383]  # fits its tile with its padding only just
    _assert_equal(*_one_as_on_a_gpu(x, scaling, (3, 16)), _expected(x, scaling, (3, 16)))


def test_aligned_sizes_run_the_kernel_without_padding() -> None:
    from aotrain.kernels.triton.scaled_cast import needed_multiples

    assert needed_multiples(torch.Size((64, 32)), (16, 16)) == (1, 1)
    assert needed_multiples(torch.Size((3, 37, 32)), (16, 16)) == (16, 1)
    assert needed_multiples(torch.Size((64, 33)), (16, 16)) == (1, 16)


def test_shapes() -> None:
    assert padded_shape((2, 37, 100), (16, 128)) == (2, 48, 128)
    assert padded_shape((0, 16), (4, 16)) == (0, 16)


def test_opcheck_of_both() -> None:
    arguments = ("float8_e4m3fn", "float32", *ROWWISE)
    torch.library.opcheck(
        torch.ops.aotrain.scaled_cast_both, (torch.randn(37, 100), *arguments, *arguments, (1, 16), (16, 16))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1030)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_on_a_gpu(block: Block, shape: tuple[int, ...]) -> None:
    x, scaling = torch.randn(shape), Scaling(element=FLOAT8_E4M3, block=block)
    for pads in PADS:
        for operand in (x, x.mT):
            _assert_equal(*scaled_cast(operand.cuda(), scaling, pad=pads[0])[:2], _expected(operand, scaling, pads[0]))
            q, q_t = scaled_cast_both(operand.cuda(), scaling, scaling, pad=pads[0], pad_t=pads[1])
            _assert_equal(*q[:2], _expected(operand, scaling, pads[0]))
            _assert_equal(*q_t[:2], _expected(operand.mT, scaling, pads[1]))
