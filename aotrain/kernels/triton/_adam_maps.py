"""The maps of optimizer state (formats/codebook.py) as the tables that the Adam kernel looks up in shared memory.

**Decoding** is one look-up by code.

**Encoding** x / scale looks up one entry by the upper bits of the quotient's float32 pattern, the bucket. A bucket is
narrow enough to hold at most one midpoint between neighbouring codes. Where its midpoint has the pattern `middle` and
`code` is the code below it,

    entry = code * 2^24 + 2^24 - middle            code of y = high byte of (entry + pattern of y)

so that adding the pattern carries into the code exactly from the midpoint on. Patterns of one bucket differ by less
than 2^24. All of it is int32 arithmetic modulo 2^32.

The signed maps have entries for magnitudes only: -y has the mirror image of y's code. A tie goes to the larger value,
so a negative number at a midpoint stays below it: its pattern is reduced by one.
"""

import functools
from typing import NamedTuple

import torch

from aotrain.formats.codebook import dynamic_codebook

# Quotients carry this factor, so that factor / scale is a normal number for every finite scale.
QUOTIENT_FACTOR = 4.0
CODE_SHIFT = 24
_BITS = {"dynamic8": 8, "dynamic4": 4}


class MapConstants(NamedTuple):
    """What the kernel must know of one map at compile time.

    Attributes:
        signed: whether there are codes for negative numbers.
        entries_at: position of the entries in `packed_tables`.
        size: number of entries, a power of two.
        shift: the bucket of y is (pattern of y * QUOTIENT_FACTOR >> shift) - first.
        first: see `shift`.
        lowest: start of the first bucket, below every midpoint.
        most_negative: the most negative value times QUOTIENT_FACTOR; there is no code for -1.
    """

    signed: bool
    entries_at: int
    size: int
    shift: int
    first: int
    lowest: float
    most_negative: float


class _Map(NamedTuple):
    constants: MapConstants
    values: torch.Tensor  # of each code, float32
    entries: torch.Tensor  # int32 [size]


def map_constants(state_format: str, signed: bool) -> MapConstants | None:
    """Constants of a map of "dynamic8" or "dynamic4"; None for other formats."""
    return _map(signed, _BITS[state_format]).constants if state_format in _BITS else None


@functools.lru_cache(maxsize=16)
def packed_tables(state_format: str, device: torch.device) -> torch.Tensor:
    """Values of the signed and of the unsigned map, then their entries, as one int32 tensor. Cached and shared.

    Formats without a map get a tensor that is not read.
    """
    if state_format not in _BITS:
        return torch.zeros(1, dtype=torch.int32, device=device)
    maps = [_map(signed, _BITS[state_format]) for signed in (True, False)]
    return torch.cat([*(each.values.view(torch.int32) for each in maps), *(each.entries for each in maps)]).to(device)


@functools.lru_cache(maxsize=4)
def _map(signed: bool, bits: int) -> _Map:
    values = dynamic_codebook(signed, torch.device("cpu"), bits)
    zero_code = 2 ** (bits - 1) - 1 if signed else 0
    magnitudes = values[zero_code:]
    midpoints = (magnitudes[:-1] + magnitudes[1:]) * 0.5 * QUOTIENT_FACTOR
    patterns = midpoints.view(torch.int32).long()
    shift = _widest_bucket(patterns)
    first = int(patterns[0] >> shift) - 1
    last = int(torch.tensor(QUOTIENT_FACTOR).view(torch.int32) >> shift)
    starts = torch.arange(first, last + 1) << shift
    index = torch.bucketize(starts, patterns)  # midpoints below the start
    middle = torch.nn.functional.pad(patterns, (0, 1), value=2**31)[index]
    has_midpoint = middle < starts + (1 << shift)
    half = 1 << (CODE_SHIFT - 1)
    entries = (zero_code + index << CODE_SHIFT) + torch.where(has_midpoint, 2 * half - middle, half - starts)
    size = 1 << (len(entries) - 1).bit_length()
    constants = MapConstants(
        signed=signed,
        # The entries of the unsigned map come after those of the signed.
        entries_at=2 * 2**bits + (0 if signed else _map(True, bits).constants.size),
        size=size,
        shift=shift,
        first=first,
        lowest=float(starts[:1].to(torch.int32).view(torch.float32)),
        most_negative=-float(magnitudes[-2]) * QUOTIENT_FACTOR,
    )
    return _Map(constants, values, torch.nn.functional.pad(_wrapped(entries), (0, size - len(entries))))


def _widest_bucket(patterns: torch.Tensor) -> int:
    """The largest shift that gives every midpoint a bucket of its own."""
    for shift in range(CODE_SHIFT - 1, 0, -1):
        buckets = patterns >> shift
        if bool((buckets[1:] > buckets[:-1]).all()):
            return shift
    raise AssertionError("two midpoints are equal")


def _wrapped(x: torch.Tensor) -> torch.Tensor:
    """int64 values modulo 2^32 as int32."""
    return (((x + 2**31) % 2**32) - 2**31).to(torch.int32)
