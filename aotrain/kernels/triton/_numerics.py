"""Device functions for scales and float8 casts, bit-identical to `aotrain.formats`.

Every conversion and every scale of every kernel goes through this file. The rules that make a GPU give a CPU's bits:
widen to float32 right after the load, divide with `tl.div_rn`, no fused multiply-add (`enable_fp_fusion=False` at
launch), no reliance on how an instruction treats NaN or overflow.
"""

import triton
import triton.language as tl

# formats.scaling.AMAX_MIN, which rounds to just below 1e-12 in float32.
_AMAX_MIN = tl.constexpr(1e-12)
_MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
_EXPONENT_MASK = tl.constexpr(0x7F800000)
_MANTISSA_MASK = tl.constexpr(0x007FFFFF)
_HALF_OF_SMALLEST_NORMAL = tl.constexpr(0x00400000)
_ONE_BITS = tl.constexpr(0x3F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
# The positive quiet NaN of both e4m3fn and e5m2.
_FLOAT8_NAN_CODE = tl.constexpr(0x7F)
# 1.5 * 2^23: float32 numbers of this size have a spacing of 1, on both sides.
_SPACING_OF_ONE = tl.constexpr(12582912.0)


@triton.jit
def magnitude_bits(x):
    """|x| of a float32 tensor as int32, in the same order, with NaN above infinity.

    Maxima are taken on these bits because floating-point maxima drop NaN on a GPU; integer maxima cost the same.
    """
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE_MASK


@triton.jit
def scales_from_amax_bits(
    amax_bits, ELEMENT_MAX: tl.constexpr, INV_SCALE_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """(scale, inv_scale) of blocks whose largest magnitude has the given bits; formats.scales_from_amax for float32.

    The definition is fp32(max / clamp(fp64(amax), 1e-12)). Above the bound one correctly rounded float32 division gives
    the same bits: rounding a quotient of float32 numbers first to 53 and then to 24 bits equals rounding it once,
    because 53 >= 2 * 24 + 2 (Figueroa, "When is double rounding innocuous?", 1995). At and below the bound the result
    is the constant INV_SCALE_MAX = fp32(max / 1e-12).
    """
    amax = amax_bits.to(tl.float32, bitcast=True)
    numerator = tl.full(amax.shape, ELEMENT_MAX, tl.float32)
    # A NaN fails the comparison and goes through the division.
    inv_scale = tl.where(amax <= _AMAX_MIN, INV_SCALE_MAX, tl.div_rn(numerator, amax))
    if POWER_OF_TWO:
        floored = (inv_scale.to(tl.int32, bitcast=True) & _EXPONENT_MASK).to(tl.float32, bitcast=True)
        inv_scale = tl.where(amax != amax, amax, floored)
    reciprocal = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), inv_scale)
    scale_bits = tl.where(amax != amax, _NAN_BITS, reciprocal.to(tl.int32, bitcast=True))
    return scale_bits.to(tl.float32, bitcast=True), inv_scale


@triton.jit
def saturating_cast(x, ELEMENT: tl.constexpr, ELEMENT_MAX: tl.constexpr):
    """formats.round_nearest for e4m3fn, e5m2 and int8: x is float32, the result has the type ELEMENT.

    The clamp turns every NaN into the one quiet NaN of the hardware, whatever its sign (an invalid operation's is
    negative on x86, positive on a GPU), and that one converts to code 0x7f. An integer is rounded, ties to even, by an
    addition that leaves it in the low bits of the sum.
    """
    if ELEMENT == tl.int8:
        clamped = tl.clamp(tl.where(x != x, 0.0, x), -ELEMENT_MAX, ELEMENT_MAX)
        return (clamped + _SPACING_OF_ONE).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.clamp(x, -ELEMENT_MAX, ELEMENT_MAX, propagate_nan=tl.PropagateNan.ALL).to(ELEMENT)


@triton.jit
def e8m0_from_amax_bits(
    amax_bits,
    ROUNDING: tl.constexpr,
    ELEMENT_MAX_INVERSE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """E8M0 byte, as int32, of blocks whose largest magnitude has the given bits: formats.e8m0.

    All of it on the bits, but for the one product of `rceil`; ROUNDING is one of formats.e8m0.E8M0_ROUNDINGS.
    """
    if ROUNDING == "rceil":
        inverse = tl.full(amax_bits.shape, ELEMENT_MAX_INVERSE, tl.float32)
        bits = (amax_bits.to(tl.float32, bitcast=True) * inverse).to(tl.int32, bitcast=True)
        exponent = bits >> 23
        byte = exponent + ((bits & _MANTISSA_MASK) > tl.where(exponent == 0, _HALF_OF_SMALLEST_NORMAL, 0)).to(tl.int32)
    else:
        bits = amax_bits
        if ROUNDING == "even":
            bits = bits + (_HALF_OF_SMALLEST_NORMAL >> MANTISSA_BITS)
        byte = bits >> 23
        if ROUNDING == "ceil":
            byte += ((bits & _MANTISSA_MASK) != 0).to(tl.int32)
        byte = tl.maximum(byte - MAX_EXPONENT, 0)
    return tl.where(amax_bits < _EXPONENT_MASK, byte, 255)


@triton.jit
def e8m0_inverse(byte):
    """formats.e8m0.e8m0_inverse: the float32 2^(127 - byte) of int32 bytes, NaN for 255."""
    bits = tl.where(byte < 254, (254 - byte) << 23, _HALF_OF_SMALLEST_NORMAL)
    return tl.where(byte == 255, _NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_code(x, ELEMENT_MAX: tl.constexpr):
    """formats.round_nearest for e2m1: the code of each float32, as int32.

    Adding 2^22 times the power of two below x, or below 1, leaves the number of steps in the low bits of the sum,
    rounded to nearest, ties to even.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & _MAGNITUDE_MASK, tl.full(x.shape, ELEMENT_MAX, tl.float32).to(tl.int32, bitcast=True))
    exponent = tl.maximum(magnitude & _EXPONENT_MASK, _ONE_BITS)
    total = magnitude.to(tl.float32, bitcast=True) + (exponent + (22 << 23)).to(tl.float32, bitcast=True)
    code = (total.to(tl.int32, bitcast=True) + (exponent >> 22)) - (_ONE_BITS >> 22)
    return tl.where(x != x, 0, (code & 7) | ((bits >> 28) & 8))
