"""A matrix quantized in parts has the codes and scales of the matrix quantized whole, wherever it is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import COLWISE, FLOAT8_E4M3, INT8, ROWWISE, SCALE_FORMATS, TENSORWISE, Scaling, quantize
from aotrain.formats.scaling import scales_from_amax
from aotrain.nn.shard_amax import Part, part_amax, scaling_of_part
from aotrain.testing import assert_bitwise_equal

SCALINGS = [
    Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)
    for element, scale in ((FLOAT8_E4M3, "float32"), (FLOAT8_E4M3, "float32_pow2"), (INT8, "float32"))
    for block in (TENSORWISE, ROWWISE, COLWISE, (1, 4), (4, 4), (4, 8))
]


def cut(x: torch.Tensor, starts: list[int], dim: int) -> list[tuple[torch.Tensor, Part]]:
    whole = (x.shape[0], x.shape[1])
    parts = []
    for start, end in zip([0, *starts], [*starts, whole[dim]], strict=True):
        piece = x.narrow(dim, start, end - start)
        offset = (start, 0) if dim == 0 else (0, start)
        parts.append((piece, Part(whole=whole, start=offset, shape=(piece.shape[0], piece.shape[1]))))
    return parts


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 11),
    dim=st.integers(0, 1),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    special=st.sampled_from([0.0, 1.0, math.inf, math.nan]),
)
@settings(max_examples=25, deadline=None)
def test_parts_have_the_codes_of_the_whole(scaling, rows, columns, dim, cuts, dtype, special):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 17 + columns))
    x[rows // 2, columns // 3] = special
    want = quantize(x.to(dtype), scaling)
    parts = cut(x, sorted(int(share * x.shape[dim]) for share in cuts), dim)
    tables = torch.stack([part_amax(piece, scaling.block, part) for piece, part in parts])
    # The amax of the float32 values, rounded, is the amax of the rounded values.
    amax = tables.view(torch.int32).amax(0).view(torch.float32).to(dtype).float()
    codes = []
    for piece, part in parts:
        local, local_amax = scaling_of_part(scaling, amax, part)
        codes.append(quantize(piece.to(dtype), local, amax=local_amax).data)
    assert_bitwise_equal(torch.cat(codes, dim), want.data)
    assert_bitwise_equal(scales_from_amax(amax, scaling)[0], want.scale)
