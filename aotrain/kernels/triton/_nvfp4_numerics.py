"""Device functions of NVFP4, bit-identical to `aotrain.formats`: scales, e2m1 codes, the Hadamard transform.

The rules are those of `_numerics`. Roundings are done on float32 bits, with additions whose sum has the spacing of the
format, so that no instruction's treatment of NaN, overflow or subnormals matters.
"""

import numpy as np
import triton
import triton.language as tl

_AMAX_MIN = tl.constexpr(1e-12)
_GLOBAL_MAX = tl.constexpr(448.0 * 6.0)
_GLOBAL_MIN = tl.constexpr(float(np.float32(1e-12 / 2688)))
_MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
_EXPONENT_MASK = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_ONE = tl.constexpr(127 << 23)
_QUARTER = tl.constexpr(0.25)
_RECIPROCAL_ROOT_OF_32 = tl.constexpr(float(np.float32(32**-0.5)))
_SIX = tl.constexpr(0x40C00000)
# Of e4m3: its smallest value 2^-9, its largest 448, and the binade of its smallest normal value.
_E4M3_MIN, _E4M3_MAX, _E4M3_BINADE = tl.constexpr(118 << 23), tl.constexpr(0x43E00000), tl.constexpr(121 << 23)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _value(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def global_scale_from_bits(amax_bits):
    """formats.nvfp4_global_scale of a largest magnitude given by its bits; one division rounds as two (`_numerics`)."""
    amax = _value(amax_bits)
    scale = tl.where(amax <= _AMAX_MIN, _GLOBAL_MIN, tl.div_rn(amax, tl.full(amax.shape, _GLOBAL_MAX, tl.float32)))
    return _value(tl.where(amax != amax, _NAN_BITS, _bits(scale)))


@triton.jit
def block_scales(amax_bits, global_scale, inv_global):
    """(e4m3 code, inv_scale) of blocks whose largest magnitude has the given bits.

    Args:
        global_scale: of the matrix, in the shape of amax_bits.
        inv_global: its reciprocal, likewise.
    """
    six = tl.full(amax_bits.shape, 6.0, tl.float32)
    quotient = _bits(tl.div_rn(tl.div_rn(_value(amax_bits), six), global_scale)) & _MAGNITUDE_MASK
    relative = tl.minimum(tl.maximum(quotient, _E4M3_MIN), _E4M3_MAX)
    exponent = tl.maximum(relative & _EXPONENT_MASK, _E4M3_BINADE)
    step = _value(exponent + (20 << 23))
    total = _value(relative) + step
    code = _bits(total) + (exponent >> 20) - (_E4M3_BINADE >> 20)
    bad = (amax_bits >= _EXPONENT_MASK) | (quotient > _EXPONENT_MASK)
    inverse = tl.div_rn(inv_global, total - step)
    return tl.where(bad, 0x7F, code & 0x7F), _value(tl.where(bad, _NAN_BITS, _bits(inverse)))


@triton.jit
def _saturated(y):
    """(magnitude that e2m1 has, its binade as float32 bits); all below 2 count as the binade of 1."""
    magnitude = tl.minimum(_bits(y) & _MAGNITUDE_MASK, _SIX)
    return _value(magnitude), tl.maximum(magnitude & _EXPONENT_MASK, _ONE)


@triton.jit
def _signed_code(code, y):
    bits = _bits(y)
    return tl.where((bits & _MAGNITUDE_MASK) > _EXPONENT_MASK, 0, (code & 7) | ((bits >> 28) & 8))


@triton.jit
def nearest_code(y):
    """round_nearest to e2m1 as a code in int32; NaN is 0."""
    magnitude, exponent = _saturated(y)
    total = magnitude + _value(exponent + (22 << 23))
    return _signed_code(_bits(total) + (exponent >> 22) - (_ONE >> 22), y)


@triton.jit
def stochastic_code(y, noise):
    """round_stochastic to e2m1 as a code in int32, with 16 random bits in int32."""
    magnitude, exponent = _saturated(y)
    steps = magnitude * _value((255 << 23) - exponent)  # exact, below 4
    whole = steps.to(tl.int32)
    # frac + noise / 2^16 >= 1, without a sum that rounds.
    up = (steps - whole.to(tl.float32) >= 1.0 - noise.to(tl.float32) * 0.0000152587890625).to(tl.int32)
    return _signed_code(((exponent - _ONE) >> 22) + whole + up, y)


@triton.jit
def _butterfly(u, v):
    return u + v, u - v


@triton.jit
def _stage(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    """Eight butterflies of pairs (a, b)."""
    a0, b0 = _butterfly(a0, b0)
    a1, b1 = _butterfly(a1, b1)
    a2, b2 = _butterfly(a2, b2)
    a3, b3 = _butterfly(a3, b3)
    a4, b4 = _butterfly(a4, b4)
    a5, b5 = _butterfly(a5, b5)
    a6, b6 = _butterfly(a6, b6)
    a7, b7 = _butterfly(a7, b7)
    return a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7


@triton.jit
def butterflies16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """`hadamard16` times 4: distances 1 to 8 of the butterflies."""
    x0, x2, x4, x6, x8, x10, x12, x14, x1, x3, x5, x7, x9, x11, x13, x15 = _stage(
        x0, x2, x4, x6, x8, x10, x12, x14, x1, x3, x5, x7, x9, x11, x13, x15
    )
    x0, x1, x4, x5, x8, x9, x12, x13, x2, x3, x6, x7, x10, x11, x14, x15 = _stage(
        x0, x1, x4, x5, x8, x9, x12, x13, x2, x3, x6, x7, x10, x11, x14, x15
    )
    x0, x1, x2, x3, x8, x9, x10, x11, x4, x5, x6, x7, x12, x13, x14, x15 = _stage(
        x0, x1, x2, x3, x8, x9, x10, x11, x4, x5, x6, x7, x12, x13, x14, x15
    )
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _stage(
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
    )
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _times(q, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 * q, x1 * q, x2 * q, x3 * q, x4 * q, x5 * q, x6 * q, x7 * q
    x8, x9, x10, x11, x12, x13, x14, x15 = x8 * q, x9 * q, x10 * q, x11 * q, x12 * q, x13 * q, x14 * q, x15 * q
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def hadamard16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """formats.hadamard_transform of sixteen tensors that have their signs, each one element of every block."""
    y = butterflies16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    return _times(_QUARTER, *y)


@triton.jit
def hadamard32(low, high):
    """`hadamard16` of 32 tensors, two tuples of sixteen: (the first sixteen results, the others)."""
    low, high = butterflies16(*low), butterflies16(*high)
    a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7 = _stage(
        *(low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7]),
        *(high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7]),
    )
    a8, a9, a10, a11, a12, a13, a14, a15, b8, b9, b10, b11, b12, b13, b14, b15 = _stage(
        *(low[8], low[9], low[10], low[11], low[12], low[13], low[14], low[15]),
        *(high[8], high[9], high[10], high[11], high[12], high[13], high[14], high[15]),
    )
    return (
        _times(_RECIPROCAL_ROOT_OF_32, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15),
        _times(_RECIPROCAL_ROOT_OF_32, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15),
    )
