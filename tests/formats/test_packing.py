"""Two e2m1 codes per byte: order, every pair, odd lengths, and torch's dtype for it."""

import pytest
import torch

from aotrain.formats import pack_float4, unpack_float4


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
