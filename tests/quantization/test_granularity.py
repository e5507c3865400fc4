"""Granularities: sizes of the blocks that share a scale."""

import pytest

from aotrain.quantization import (
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    get_block_size,
)


@pytest.mark.parametrize(
    ("granularity", "want"),
    [
        (PerTensor(), (2, 6, 8)),
        (PerAxis(0), (1, 6, 8)),
        (PerAxis(-1), (2, 6, 1)),
        (PerRow(), (1, 1, 8)),
        (PerRow(1), (1, 6, 1)),
        (PerToken(), (1, 1, 8)),
        (PerGroup(4), (1, 1, 4)),
        (PerBlock([3, 4]), (1, 3, 4)),
        (PerBlock((2, 3, 4)), (2, 3, 4)),
    ],
    ids=str,
)
def test_block_sizes(granularity, want):
    assert get_block_size((2, 6, 8), granularity) == want
    assert hash(granularity) == hash(type(granularity)(**vars(granularity)))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="a group that divides"):
        get_block_size((2, 9), PerGroup(4))
    with pytest.raises(ValueError, match="a dimension that it has"):
        get_block_size((2, 9), PerAxis(2))
    with pytest.raises(ValueError, match="at most as many"):
        get_block_size((9,), PerBlock((1, 2)))
    with pytest.raises(TypeError, match=r"such as PerRow\(\)"):
        get_block_size((2, 9), PerRow)  # type: ignore[arg-type]
