"""Codes in bytes: order, every pair, odd lengths, and torch's dtype for it."""

import pytest
import torch

from aotrain.formats import pack_codes, pack_float4, unpack_codes, unpack_float4


def test_every_pair_has_the_even_element_in_the_low_half():
    even, odd = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack([even, odd], dim=-1).flatten().to(torch.uint8)
    packed = pack_float4(codes)
    assert packed.tolist() == [low + 16 * high for low in range(16) for high in range(16)]
    assert torch.equal(unpack_float4(packed, codes.numel()), codes)


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 8), (1, 1), (0, 4), (4, 0), (5,)], ids=str)
def test_unpack_is_the_inverse(shape: tuple[int, ...]):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_float4(codes)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert torch.equal(unpack_float4(packed, shape[-1]), codes)
    if shape[-1] % 2:
        assert not (packed[..., -1] >> 4).any()


def test_packed_bytes_are_torchs_float4_and_any_view_can_be_packed():
    codes = torch.randint(0, 16, (6, 8), dtype=torch.uint8)
    packed = pack_float4(codes).view(torch.float4_e2m1fn_x2)
    assert packed.shape == (6, 4)
    assert torch.equal(unpack_float4(packed, 8), codes)
    assert torch.equal(pack_float4(codes.t()), pack_float4(codes.t().contiguous()))
    with pytest.raises(ValueError, match="want 5"):
        unpack_float4(packed, 9)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 8), (0, 4), (4, 0), (17,)], ids=str)
def test_codes_of_every_width(shape: tuple[int, ...], bits: int):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, shape[-1]), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack_codes(torch.tensor([3, 0, 2, 1], dtype=torch.uint8), 2).tolist() == [0b01_10_00_11]
    with pytest.raises(ValueError, match="3 bits; want 1, 2, 4 or 8"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="of 2 bits; want 3"):
        unpack_codes(torch.zeros(2, dtype=torch.uint8), 2, 9)
