"""Adam(W) steps of many parameters in one launch: aotrain.optim.step on the state of aotrain.optim.state, bit for bit.

A program steps a tile, `TILE_BLOCKS` scale blocks of one parameter: it decodes both moments, updates, takes the largest
magnitude of each block, encodes both moments and writes the parameter. Nothing is read or written twice. Where the
parameter lies comes from a table of addresses (`_adam_launch`), one row per parameter, and a map from programs to rows.

Bytes moved per element, with 8-bit state: 10 for a bfloat16 parameter and gradient (2 + 2 read, 2 written, 2 x 2 of
codes), 16 for float32, and 2 x 8 per block of scales. 4-bit: 8 and 14. float32 state: 22 and 28.

Exactness:

- Each operation is rounded once, as in the reference: fusion is off at launch, roots and quotients are `sqrt_rn` and
  `div_rn`.
- x / scale is needed to decide on which side of a midpoint it lies. With R the correctly rounded reciprocal of the
  scale, q0 = x * R and q = q0 + (x - q0 * scale) * R with two fused multiply-adds; the tests show by enumerating the
  hard cases that q compares with every midpoint as the correctly rounded quotient does.
- Codes are looked up in shared memory (`tl.gather`), which takes 4 instructions to decode and 4 to encode; see
  `_adam_maps`.
"""

import triton
import triton.language as tl

from aotrain.formats import BFLOAT16
from aotrain.kernels.triton._adam_maps import CODE_SHIFT, QUOTIENT_FACTOR
from aotrain.kernels.triton._numerics import magnitude_bits, saturating_cast

# Columns of the address table.
_PARAM, _GRAD = tl.constexpr(0), tl.constexpr(1)
_EXP_AVG, _EXP_AVG_SCALE = tl.constexpr(2), tl.constexpr(3)
_EXP_AVG_SQ, _EXP_AVG_SQ_SCALE = tl.constexpr(4), tl.constexpr(5)
_NUM_BLOCKS, _ROW_LENGTH, _BLOCKS_PER_ROW = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
_FIRST_TILE, _FIRST_INDEX, _ROW_STRIDE = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
NUM_COLUMNS = 12
_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)

_AMAX_MIN = tl.constexpr(1e-12)
_FLOAT8_MAX = tl.constexpr(448.0)
_BYTE = tl.constexpr(255)
_HIGH_BYTE = tl.constexpr(-(1 << 24))
_HIGH_HALF = tl.constexpr(-(1 << 16))
_HIGH_NIBBLE = tl.constexpr(-(1 << 28))
_LOW_NIBBLE = tl.constexpr(0x0F << 24)
# Added for a negative number: one code more, one pattern less.
_MIRROR = tl.constexpr(1 - (1 << CODE_SHIFT))
_FACTOR = tl.constexpr(QUOTIENT_FACTOR)
_BFLOAT16_MAX = tl.constexpr(BFLOAT16.max)


@triton.jit
def _pointer(address_ptr, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """What an entry of the address table points to, as TYPE."""
    return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(TYPE)), ALIGNMENT)


@triton.jit
def _interleave(a, b, c, d):
    """[rows, n] four times -> [rows, 4 n]: a0 b0 c0 d0 a1 ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def _unpack_bytes(words):
    return _interleave(words & _BYTE, (words >> 8) & _BYTE, (words >> 16) & _BYTE, (words >> 24) & _BYTE)


@triton.jit
def _pack_bytes(codes):
    """Words of four codes along a row, from int32 with the code in the high byte."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1] // 4, 2, 2)))
    low, high = tl.split(((even >> 8) & 0xFFFFFF) | (odd & _HIGH_BYTE))
    return ((low >> 16) & 0xFFFF) | (high & _HIGH_HALF)


@triton.jit
def _unpack_nibbles(codes):
    return tl.reshape(tl.join(codes >> 4, codes & 15), (codes.shape[0], 2 * codes.shape[1]))


@triton.jit
def _pack_nibbles(codes):
    """Pairs of 4-bit codes in the high byte, the even element in its high half; codes in the low half before."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1] // 2, 2)))
    return ((even << 4) & _HIGH_NIBBLE) | (odd & _LOW_NIBBLE)


@triton.jit
def _unpack(state, STATE: tl.constexpr, WORDS: tl.constexpr):
    """Codes, one per element, from what a moment is stored in: int32, and uint8 for float8."""
    codes = state if STATE == "float8_e4m3fn" else state.to(tl.int32)
    if WORDS:
        codes = _unpack_bytes(codes)
    if STATE == "dynamic4":
        codes = _unpack_nibbles(codes)
    return codes


@triton.jit
def _pack(codes, mask, STATE: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """The reverse of `_unpack`, from codes in the high byte of int32."""
    if STATE == "dynamic4":
        if not WHOLE:  # the last byte of a row of odd length is padded with code 0
            codes = tl.where(mask, codes, 0)
        codes = _pack_nibbles(codes)
    if WORDS:
        codes = _pack_bytes(codes)
    else:
        codes = codes >> 24
    return codes


@triton.jit
def _load_numbers(
    address_ptr, TYPE: tl.constexpr, origin, start, block_mask, mask, ALIGNMENT: tl.constexpr, WORDS: tl.constexpr
):
    """float32 of a parameter or gradient [rows, columns]. A word of two bfloat16 is unpacked by two instructions."""
    if WORDS and TYPE == tl.bfloat16:
        HALF: tl.constexpr = mask.shape[1] // 2
        offsets = (start >> 1)[:, None] + tl.arange(0, HALF)[None, :]
        pointers = _pointer(address_ptr, tl.int32, ALIGNMENT) + origin * HALF + offsets
        words = tl.load(pointers, mask=tl.broadcast_to(block_mask[:, None], pointers.shape))
        halves = tl.join(words << 16, words & _HIGH_HALF)
        numbers = tl.reshape(halves, mask.shape).to(tl.float32, bitcast=True)
    else:
        pointers = _pointer(address_ptr, TYPE, ALIGNMENT) + origin * mask.shape[1]
        offsets = start[:, None] + tl.arange(0, mask.shape[1])[None, :]
        numbers = tl.load(pointers + offsets, mask=mask).to(tl.float32)
    return numbers


@triton.jit
def _gather(values, index):
    """values[index] for an index of any shape."""
    return tl.reshape(tl.gather(values, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def _decode(codes, scale, decode_ptr, STATE: tl.constexpr):
    """Values of codes: a code's value times its block's scale."""
    if STATE == "float8_e4m3fn":
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        SIZE: tl.constexpr = tl.constexpr(16 if STATE == "dynamic4" else 256)
        values = _gather(tl.load(decode_ptr + tl.arange(0, SIZE)), codes).to(tl.float32, bitcast=True)
    return values * scale[:, None]


@triton.jit
def _quotient(x, scale, FACTOR: tl.constexpr):
    """FACTOR * (x / scale), close enough to correctly rounded for every comparison that encoding makes.

    An infinite scale gives zeros, and NaN for infinities, as the division does. The sign of a zero is arbitrary.
    """
    inverse = tl.div_rn(tl.full(scale.shape, FACTOR, tl.float32), scale)
    minus_divisor = tl.where(scale == float("inf"), 0.0, scale * (-1.0 / FACTOR))
    estimate = x * inverse[:, None]
    remainder = tl.fma(estimate, tl.broadcast_to(minus_divisor[:, None], x.shape), x)
    return tl.fma(remainder, tl.broadcast_to(inverse[:, None], x.shape), estimate)


@triton.jit
def _encode(x, scale, maps_ptr, STATE: tl.constexpr, MAP):
    """Codes of x / scale, int32 with the code in the high byte."""
    if STATE == "float8_e4m3fn":
        quotient = _quotient(x, scale, 1.0)
        quotient = tl.where(quotient == 0.0, x * 0.0, quotient)  # a zero with the sign of x
        rounded = saturating_cast(quotient, tl.float8e4nv, _FLOAT8_MAX)
        codes = rounded.to(tl.uint8, bitcast=True).to(tl.int32) << 24
    else:
        # NaN becomes the largest value: the minimum takes the number.
        quotient = tl.minimum(_quotient(x, scale, _FACTOR), _FACTOR)
        if MAP.signed:
            quotient = tl.maximum(quotient, MAP.most_negative)
        sign = quotient.to(tl.int32, bitcast=True) >> 31
        magnitude = tl.abs(quotient) if MAP.signed else quotient
        bits = tl.maximum(magnitude, MAP.lowest).to(tl.int32, bitcast=True)
        entry = _gather(tl.load(maps_ptr + MAP.entries_at + tl.arange(0, MAP.size)), (bits >> MAP.shift) - MAP.first)
        if MAP.signed:
            # The mirror image of code c is 2^bits - 1 - (c + 1), and ties go the other way.
            codes = (entry + sign * _MIRROR + bits) ^ sign
        else:
            codes = entry + bits
    return codes


@triton.jit
def _scale_of(x, STATE: tl.constexpr, NONNEGATIVE: tl.constexpr):
    """Scale of each block (row) of x."""
    if NONNEGATIVE:  # a NaN with its sign bit is the largest, too
        amax = tl.max(x.to(tl.uint32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    else:
        amax = tl.max(magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)
    amax = tl.where(amax < _AMAX_MIN, _AMAX_MIN, amax)
    if STATE == "float8_e4m3fn":
        amax = tl.div_rn(amax, tl.full(amax.shape, _FLOAT8_MAX, tl.float32))
    return amax


@triton.jit
def _noise_of_eight(key, first, COLUMNS: tl.constexpr):
    """formats.philox_bits16 for rows of consecutive indices, each starting at a multiple of 8: int32 [rows, COLUMNS].

    Args:
        first: int64 [rows].
    """
    counter = (first >> 3)[:, None] + tl.arange(0, COLUMNS // 8)[None, :]
    w0, w1, w2, w3 = tl.randint4x(key, counter)
    words = _interleave(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (first.shape[0], COLUMNS))


@triton.jit
def _noise_of_each(key, index):
    """formats.philox_bits16 of any indices, int64 to int32 of the same shape."""
    w0, w1, w2, w3 = tl.randint4x(key, index >> 3)
    word = (index >> 1) & 3
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    bits = tl.where(word < 2, low, high).to(tl.uint32, bitcast=True) >> ((index & 1) << 4).to(tl.uint32)
    return (bits & 0xFFFF).to(tl.int32)


@triton.jit
def _noise(key, first, COLUMNS: tl.constexpr, ROUNDING: tl.constexpr):
    """formats.philox_bits16 for rows of consecutive indices: int32 [rows, COLUMNS]."""
    if ROUNDING == "stochastic8":
        return _noise_of_eight(key, first, COLUMNS)
    return _noise_of_each(key, first[:, None] + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _round_stochastic(x, noise):
    """float32 to bfloat16: saturating for finite numbers; infinity is kept, and NaN if it is quiet, as results are."""
    bits = x.to(tl.int32, bitcast=True)
    # From the largest bfloat16 on, dropping the low half is right for numbers and for infinity.
    bits += tl.where(tl.abs(x) < _BFLOAT16_MAX, noise, 0)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def adam_kernel(
    table_ptr,  # int64 [parameters, NUM_COLUMNS]
    tile_ptr,  # int32 [programs]: the parameter of each
    key_ptr,  # int64 [parameters]: Philox keys
    maps_ptr,  # int32: `packed_tables`
    one_minus_beta1,
    one_minus_beta2,
    eps,
    decay_factor,
    coupled_decay,
    step_size,
    inv_sqrt_bias_correction2,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE: tl.constexpr,  # "dynamic8", "dynamic4", "float8_e4m3fn" or "float32"
    SIGNED_MAP: tl.constexpr,  # MapConstants of the first moment; None if the state has no map
    UNSIGNED_MAP: tl.constexpr,  # of the second moment
    BLOCK: tl.constexpr,  # elements per scale, a power of two
    TILE_BLOCKS: tl.constexpr,  # blocks per program, a power of two
    FLAT: tl.constexpr,  # every parameter is one row
    WHOLE: tl.constexpr,  # no block is cut off by the end of its row
    ALIGNED: tl.constexpr,  # addresses are multiples of 16, and so are row lengths where they matter
    MAXIMIZE: tl.constexpr,
    COUPLED: tl.constexpr,
    ROUNDING: tl.constexpr,  # "nearest"; "stochastic", or "stochastic8" if eight neighbours always share a counter
):
    QUANTIZED: tl.constexpr = STATE != "float32"
    PACKED: tl.constexpr = STATE == "dynamic4"
    # With float32 state, words would give the parameter another layout than the state.
    WORDS: tl.constexpr = FLAT and WHOLE and ALIGNED and QUANTIZED
    CODE_WORDS: tl.constexpr = WORDS and STATE != "float8_e4m3fn"
    # 8 elements per thread: 16 bytes of bfloat16, 8 of codes. With 16, loads of float32 would leave gaps.
    WIDE: tl.constexpr = tl.constexpr(16 if ALIGNED else 1)
    STATE_TYPE: tl.constexpr = tl.constexpr(tl.int32 if CODE_WORDS else (tl.uint8 if QUANTIZED else tl.float32))
    STATE_WIDE: tl.constexpr = tl.constexpr((4 if PACKED else (8 if QUANTIZED else 16)) if ALIGNED else 1)
    # Elements per item of state.
    PER_STATE: tl.constexpr = tl.constexpr((2 if PACKED else 1) * (4 if CODE_WORDS else 1))

    # Where the tile lies.
    tensor = tl.load(tile_ptr + tl.program_id(0)).to(tl.int64)
    table = table_ptr + tensor * _NUM_COLUMNS
    first_block = (tl.program_id(0) - tl.load(table + _FIRST_TILE).to(tl.int32)) * TILE_BLOCKS
    tile = tl.arange(0, TILE_BLOCKS)
    block_mask = tile < tl.load(table + _NUM_BLOCKS).to(tl.int32) - first_block
    row_length = tl.multiple_of(tl.load(table + _ROW_LENGTH), WIDE)
    if FLAT:  # offsets from the tile's first block are constants: 32 bits, no arithmetic
        origin = first_block.to(tl.int64)
        row = tl.zeros((TILE_BLOCKS,), tl.int64)
        start_column = tile * BLOCK
        start = start_column
        state_start = tile * (BLOCK // PER_STATE)
    else:
        origin = tl.zeros((), tl.int64)
        blocks_per_row = tl.load(table + _BLOCKS_PER_ROW).to(tl.int32)
        row = ((first_block + tile) // blocks_per_row).to(tl.int64)
        start_column = ((first_block + tile) % blocks_per_row).to(tl.int64) * BLOCK
        start = row * row_length + start_column
        state_start = row * ((row_length + PER_STATE - 1) // PER_STATE) + start_column // PER_STATE
    columns = tl.arange(0, BLOCK)[None, :]
    state_columns = tl.arange(0, BLOCK // PER_STATE)[None, :]
    if WHOLE:
        mask = tl.broadcast_to(block_mask[:, None], (TILE_BLOCKS, BLOCK))
        state_mask = tl.broadcast_to(block_mask[:, None], (TILE_BLOCKS, BLOCK // PER_STATE))
    else:
        limit = row_length - origin * BLOCK
        mask = block_mask[:, None] & (start_column[:, None] + columns < limit)
        state_mask = block_mask[:, None] & (start_column[:, None] + state_columns * PER_STATE < limit)

    # Decode.
    grad = _load_numbers(table + _GRAD, GRAD_TYPE, origin, start, block_mask, mask, WIDE, WORDS)
    param = _load_numbers(table + _PARAM, PARAM_TYPE, origin, start, block_mask, mask, WIDE, WORDS)
    state_origin = origin * (BLOCK // PER_STATE)
    state_offsets = state_start[:, None] + state_columns
    m_ptrs = _pointer(table + _EXP_AVG, STATE_TYPE, STATE_WIDE) + state_origin + state_offsets
    v_ptrs = _pointer(table + _EXP_AVG_SQ, STATE_TYPE, STATE_WIDE) + state_origin + state_offsets
    m = tl.load(m_ptrs, mask=state_mask)
    v = tl.load(v_ptrs, mask=state_mask)
    if QUANTIZED:
        m_scale_ptrs = _pointer(table + _EXP_AVG_SCALE, tl.float32, 4) + first_block + tile
        v_scale_ptrs = _pointer(table + _EXP_AVG_SQ_SCALE, tl.float32, 4) + first_block + tile
        m_scale = tl.load(m_scale_ptrs, mask=block_mask)
        v_scale = tl.load(v_scale_ptrs, mask=block_mask)
        m = _decode(_unpack(m, STATE, CODE_WORDS), m_scale, maps_ptr, STATE)
        v = _decode(_unpack(v, STATE, CODE_WORDS), v_scale, maps_ptr + (16 if PACKED else 256), STATE)

    # Update.
    if MAXIMIZE:
        grad = grad * -1.0
    if COUPLED:
        grad = grad + param * coupled_decay
    param = param * decay_factor
    m = m + (grad - m) * one_minus_beta1
    v = v + (grad * grad - v) * one_minus_beta2
    denominator = tl.sqrt_rn(v) * inv_sqrt_bias_correction2 + eps
    param = param - tl.div_rn(m, denominator) * step_size
    if ROUNDING == "nearest":
        rounded = param.to(PARAM_TYPE)
    else:
        first = tl.load(table + _FIRST_INDEX) + origin * BLOCK + row * tl.load(table + _ROW_STRIDE) + start_column
        rounded = _round_stochastic(param, _noise(tl.load(key_ptr + tensor), first, BLOCK, ROUNDING))
    param_ptrs = _pointer(table + _PARAM, PARAM_TYPE, WIDE) + origin * BLOCK + (start[:, None] + columns)
    tl.store(param_ptrs, rounded, mask=mask)

    # Encode.
    if QUANTIZED:
        if not WHOLE:
            m = tl.where(mask, m, 0.0)
            v = tl.where(mask, v, 0.0)
        m_scale = _scale_of(m, STATE, False)
        v_scale = _scale_of(v, STATE, STATE != "float8_e4m3fn")
        tl.store(m_scale_ptrs, m_scale, mask=block_mask)
        tl.store(v_scale_ptrs, v_scale, mask=block_mask)
        m = _pack(_encode(m, m_scale, maps_ptr, STATE, SIGNED_MAP), mask, STATE, WHOLE, CODE_WORDS)
        v = _pack(_encode(v, v_scale, maps_ptr, STATE, UNSIGNED_MAP), mask, STATE, WHOLE, CODE_WORDS)
    tl.store(m_ptrs, m.to(STATE_TYPE), mask=state_mask)
    tl.store(v_ptrs, v.to(STATE_TYPE), mask=state_mask)
