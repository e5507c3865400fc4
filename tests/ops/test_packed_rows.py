"""Packing of codes and scales into rows of bytes: layout, round trip, sizes as documented."""

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    SCALE_FORMATS,
    Scaling,
    quantize,
)
from aotrain.ops.packed_rows import pack_rows, packed_width, unpack_rows
from aotrain.ops.quantized_all_to_all import FLOAT8_ROWS, MXFP8_ROWS
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

SCALINGS = [
    MXFP8_ROWS,
    FLOAT8_ROWS,
    Scaling(element=FLOAT8_E5M2, scale=SCALE_FORMATS["e8m0_floor"], block=(1, 32)),
    Scaling(element=INT8, block=BLOCKWISE_1X128),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("shape", [(37, 64), (5, 100), (1, 70), (3, 7), (0, 64), (2, 1)])
def test_round_trip(scaling: Scaling, shape: tuple[int, int]) -> None:
    q = quantize(adversarial_matrix(*shape), scaling)
    packed = pack_rows(q)
    assert packed.shape == (shape[0], packed_width(shape[1], scaling))
    assert packed.shape[1] % 16 == 0
    back = unpack_rows(packed, shape[1], scaling)
    assert_bitwise_equal(back.data, q.data)
    assert_bitwise_equal(back.scale, q.scale)
    used = shape[1] + q.scale.shape[1] * q.scale.element_size()
    assert_bitwise_equal(packed[:, used:], torch.zeros_like(packed[:, used:]))
    if back.scale.element_size() == 1:
        assert back.data.untyped_storage().data_ptr() == back.scale.untyped_storage().data_ptr()


def test_bytes_per_row_as_documented() -> None:
    assert packed_width(7168, MXFP8_ROWS) == 7392
    assert packed_width(7168, FLOAT8_ROWS) == 7184
    assert packed_width(64, MXFP8_ROWS) == 80
    assert packed_width(0, MXFP8_ROWS) == 0


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_128X128),
        Scaling(element=FLOAT8_E4M3),
        Scaling(element=FLOAT4_E2M1, scale=SCALE_FORMATS["e8m0_rceil"], block=(1, 32)),
    ],
    ids=str,
)
def test_what_cannot_be_sent_by_rows_is_refused(scaling: Scaling) -> None:
    with pytest.raises(ValueError, match="8-bit elements and scales of one row each"):
        packed_width(64, scaling)
