"""Affine primitives: blocks of any shape, against a loop over blocks and against the peer, bit for bit."""

import itertools

import pytest
import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.quantization import PerAxis, PerTensor, get_block_size
from aotrain.quantization.quant_primitives import (
    choose_qparams_affine,
    dequantize_affine,
    get_group_qparams_symmetric,
    quantize_affine,
)
from tests.quantization.base_configs import DTYPES, sample

BLOCKS = [(1, 1, 4), (1, 6, 8), (2, 3, 4), (2, 6, 8), (1, 2, 1), (2, 1, 8)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_quantized_as_a_row_of_its_own(block: tuple[int, ...]):
    x = sample(2, 6, 8)
    mapping = MappingType.ASYMMETRIC
    scale, zero_point = choose_qparams_affine(x, mapping, block, torch.int4, keepdim=True)
    codes = quantize_affine(x, block, scale, zero_point, torch.int4)
    values = dequantize_affine(codes, block, scale, zero_point, torch.int4)
    assert codes.dtype == torch.int8
    fmt = AffineFormat(-8, 7, mapping=mapping)
    for index in itertools.product(*(range(count) for count in scale.shape)):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, block, strict=True))
        want = fmt.quantize(x[part].reshape(1, -1))
        assert torch.equal(codes[part].flatten(), want.codes.flatten())
        assert scale[index] == want.scale.item()
        assert zero_point[index] == want.zero_point.item()
        assert torch.equal(values[part].flatten(), fmt.dequantize(want, torch.float32).flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("mapping", MappingType)
def test_they_are_the_peers(mapping: MappingType, block: tuple[int, ...], dtype: torch.dtype):
    peers = pytest.importorskip(
        "torchao.quantization.quant_primitives", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    x = sample(2, 6, 8, dtype=dtype)
    for bounds, scale_dtype, keepdim in (((-8, 7), None, False), ((-128, 127), torch.float32, True)):
        peer = peers.choose_qparams_affine(
            x, peers.MappingType[mapping.name], block, torch.int8, *bounds, None, scale_dtype, torch.int8, keepdim
        )
        ours = choose_qparams_affine(x, mapping, block, torch.int8, *bounds, None, scale_dtype, torch.int8, keepdim)
        for one, other in zip(ours, peer, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        codes = quantize_affine(x, block, *ours, torch.int8, *bounds)
        assert torch.equal(codes, peers.quantize_affine(x, block, *peer, torch.int8, *bounds))
        for output in DTYPES:
            values = dequantize_affine(codes, block, *ours, torch.int8, *bounds, output_dtype=output)
            want = peers.dequantize_affine(codes, block, *peer, torch.int8, *bounds, output_dtype=output)
            assert torch.equal(values, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_parameters_are_the_peers(dtype: torch.dtype):
    peers = pytest.importorskip(
        "torchao.quantization.utils", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    w = sample(6, 64, dtype=dtype)
    for bits, group, precision in ((4, 32, torch.float32), (8, 128, torch.bfloat16), (2, 16, dtype)):
        ours = get_group_qparams_symmetric(w, bits, group, precision)
        for one, other in zip(ours, peers.get_group_qparams_symmetric(w, bits, group, precision), strict=True):
            assert one.dtype == other.dtype == precision
            assert torch.equal(one, other)


def test_zero_points_that_are_values_or_absent():
    x = sample(4, 32) + 3
    floating = ZeroPointDomain.FLOAT
    scale, zero_point = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, (1, 32), torch.uint4, zero_point_domain=floating
    )
    codes = quantize_affine(x, (1, 32), scale, zero_point, torch.uint4, zero_point_domain=floating)
    values = dequantize_affine(codes, (1, 32), scale, zero_point, torch.uint4, zero_point_domain=floating)
    assert codes.dtype == torch.uint8
    assert (values - x).abs().max() <= scale.max() / 2 * 1.001
    scale, _ = choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 32), torch.int8)
    codes = quantize_affine(x, (1, 32), scale, None, torch.int8)
    assert torch.equal(dequantize_affine(codes, (1, 32), scale, None, torch.int8), codes * scale.unsqueeze(-1))


def test_granularities_are_blocks():
    x = sample(4, 32)
    scale, _ = choose_qparams_affine(x, MappingType.SYMMETRIC, get_block_size(x.shape, PerAxis(0)), torch.int8)
    assert torch.equal(scale, x.abs().amax(1) / 127.5)
    scale, _ = choose_qparams_affine(x, MappingType.SYMMETRIC, get_block_size(x.shape, PerTensor()), torch.int8)
    assert torch.equal(scale, x.abs().amax() / 127.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 5), torch.int8), "blocks of"),
        (lambda x: choose_qparams_affine(x, MappingType.SYMMETRIC, (32,), torch.int8), "one size per"),
        (lambda x: choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 32), torch.int16), "want int1 to int8"),
        (lambda x: choose_qparams_affine(x.double(), MappingType.SYMMETRIC, (1, 32), torch.int8), "want float32"),
        (lambda x: quantize_affine(x, (1, 32), torch.ones(3), None, torch.int8), "one per block"),
        (lambda x: get_group_qparams_symmetric(x, 9), "1 to 8"),
        (lambda x: get_group_qparams_symmetric(x, 4, 24), "which divides it"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(sample(4, 32))
