"""mx_cast on a GPU: 1 x 32 blocks with E8M0 scales, of the matrix as it lies in memory, of its transposition, or both.

    data[m, k]   = saturate(x[m, k] * 2^(127 - byte of the 32 elements of row m around k))
    data_t[k, m] = saturate(x[m, k] * 2^(127 - byte of the 32 elements of column k around m))

Bytes per element of a 16-bit x: 2 read, and per output 1 written (e2m1 packed: 1/2) and 1/32 of scales. x is read once
for both outputs, since a tile of 128 x 128 holds whole blocks of both directions.

Scales are bytes, [rows, ceil(columns / 32)] or, `blocked`, in the tiles that tensor cores read (formats.scale_layout):
a tile of the data has one tile of scales, 512 bytes with their padding. Codes of e2m1 are one per byte or, `packed`,
two, the even element in the low half. With both, nothing has to be rearranged before the product.

Four scales of a row are one store of 32 bits wherever their place is a multiple of 4 bytes.
"""

import torch
import triton
import triton.language as tl

from aotrain.formats import BLOCKWISE_1X32, ElementFormat, ScaleFormat, blocked_size, scale_shape
from aotrain.formats.scale_layout import TILE_COLUMNS, TILE_ROWS
from aotrain.kernels.triton._numerics import (
    e2m1_code,
    e8m0_from_amax_bits,
    e8m0_inverse,
    magnitude_bits,
    saturating_cast,
)
from aotrain.kernels.triton._nvfp4_numerics import stochastic_code
from aotrain.kernels.triton.adam import _noise_of_eight
from aotrain.kernels.triton.scaled_cast import Config

# A tile of scales is that of 128 x 128 elements. Rows that do not begin at multiples of 16 elements are accessed one by
# one, which needs a mask and an address each: 16 per thread leave registers for them. Not measured on a GPU yet.
TILE = Config(128, 128, 8)
RAGGED_TILE = Config(64, 64, 8)
_TILE_ROWS, _TILE_COLUMNS = tl.constexpr(TILE_ROWS), tl.constexpr(TILE_COLUMNS)
_SCALE_BLOCK = tl.constexpr(32)


@triton.jit
def _scale_places(
    scale_ptr,
    batch,
    row_tile,
    column_tile,
    M,
    K,
    scale_size,
    BLOCKED: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(pointers to the first scale of each of a tile's rows, [BLOCK_M], and which of these rows have scales)."""
    num_blocks = tl.cdiv(K, _SCALE_BLOCK)
    r = tl.arange(0, BLOCK_M)
    base = scale_ptr + batch * scale_size
    first_row, first_block = row_tile * BLOCK_M, column_tile * BLOCKS
    mask = first_row + r < M
    if BLOCKED:
        tile = first_row // _TILE_ROWS * tl.cdiv(num_blocks, _TILE_COLUMNS) + first_block // _TILE_COLUMNS
        places = base + tile * (_TILE_ROWS * _TILE_COLUMNS) + first_block % _TILE_COLUMNS
        within = (first_row % _TILE_ROWS).to(tl.int32) + r
        places += within % 32 * 16 + within // 32 * 4
        if BLOCK_M == _TILE_ROWS:  # the padding too
            mask = r < BLOCK_M
    else:
        offsets = r.to(tl.int64) * num_blocks if LONG_OFFSETS else r * num_blocks
        places = base + first_row * num_blocks + first_block + offsets
    return places, mask


@triton.jit
def _store_scales(byte, places, mask, column_tile, K, SCALE_WORDS: tl.constexpr, BLOCKS: tl.constexpr):
    """Write a tile's bytes, int32 [BLOCK_M, BLOCKS]. Past the end of x, zero bytes, as tiles have."""
    block = tl.arange(0, BLOCKS)
    if SCALE_WORDS:
        word = tl.sum(byte << (block * 8)[None, :], axis=1)
        tl.store(places.to(tl.pointer_type(tl.int32)), word, mask=mask)
    else:
        block_mask = mask[:, None] & (column_tile * BLOCKS + block < tl.cdiv(K, _SCALE_BLOCK))[None, :]
        tl.store(places[:, None] + block[None, :], byte.to(tl.uint8), mask=block_mask)


@triton.jit
def _load_scales(places, mask, column_tile, K, SCALE_WORDS: tl.constexpr, BLOCKS: tl.constexpr):
    """What `_store_scales` wrote."""
    block = tl.arange(0, BLOCKS)
    if SCALE_WORDS:
        word = tl.load(places.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        return (word[:, None] >> (block * 8)[None, :]) & 255
    block_mask = mask[:, None] & (column_tile * BLOCKS + block < tl.cdiv(K, _SCALE_BLOCK))[None, :]
    return tl.load(places[:, None] + block[None, :], mask=block_mask, other=0).to(tl.int32)


@triton.jit
def _store_data(
    x,
    byte,
    data_ptr,
    measures_ptr,
    batch,
    row_tile,
    column_tile,
    M,
    K,
    ELEMENT_MAX: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CODES: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantize a tile of float32 [BLOCK_M, BLOCK_K] with its bytes, and write it: CODES of 4 bits at a time, or 1."""
    BLOCKS: tl.constexpr = BLOCK_K // _SCALE_BLOCK
    WIDTH: tl.constexpr = BLOCK_K // CODES
    inv_scale = e8m0_inverse(byte)[:, :, None]
    scaled = (x.reshape(BLOCK_M, BLOCKS, _SCALE_BLOCK) * inv_scale).reshape(BLOCK_M, BLOCK_K)
    row_size = tl.cdiv(K, CODES)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    first_row, first_column = row_tile * BLOCK_M, column_tile * WIDTH
    mask = (first_row + rows < M)[:, None] & (first_column + columns < row_size)[None, :]
    if LONG_OFFSETS:
        rows = rows.to(tl.int64)
    first = (batch * M + first_row) * row_size + first_column
    offsets = rows[:, None] * row_size + columns[None, :]
    if not FOUR_BITS:
        data = saturating_cast(scaled, data_ptr.dtype.element_ty, ELEMENT_MAX)
        tl.store(data_ptr + first + offsets, data, mask=mask)
    else:
        if STOCHASTIC:
            row = batch * M + first_row + tl.arange(0, BLOCK_M)
            first_of_row = row * (tl.cdiv(K, _SCALE_BLOCK) * _SCALE_BLOCK) + column_tile * BLOCK_K
            code = stochastic_code(scaled, _noise_of_eight(tl.load(measures_ptr + 2), first_of_row, BLOCK_K))
        else:
            code = e2m1_code(scaled, ELEMENT_MAX)
        if CODES > 1:
            shift = (tl.arange(0, CODES) * 4)[None, None, :]
            code = tl.sum(code.reshape(BLOCK_M, WIDTH, CODES) << shift, axis=2)
        if CODES == 8:
            tl.store(data_ptr.to(tl.pointer_type(tl.int32)) + first + offsets, code, mask=mask)
        else:
            tl.store(data_ptr + first + offsets, code.to(tl.uint8), mask=mask)


@triton.jit
def _mx_cast_kernel(
    x_ptr,  # [batch, M, K], any strides
    data_ptr,  # [batch, M, K] contiguous, or [batch, M, ceil(K / 2)] packed
    scale_ptr,  # [batch, M, ceil(K / 32)] contiguous uint8, or [batch, scale_size] in tiles
    data_t_ptr,  # [batch, K, M], or [batch, K, ceil(M / 2)]
    scale_t_ptr,  # [batch, K, ceil(M / 32)], or [batch, scale_t_size]
    measures_ptr,  # int64 [3] for stochastic rounding: the last is the sum of bits, which is the key
    M,
    K,
    stride_b,
    stride_m,
    stride_k,
    scale_size,
    scale_t_size,
    ROWS: tl.constexpr,  # whether data is wanted, and data_t
    COLUMNS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,  # whether four scales of a row lie at a multiple of 4 bytes
    SCALE_WORDS_T: tl.constexpr,
    ROUNDING: tl.constexpr,
    ELEMENT_MAX: tl.constexpr,
    ELEMENT_MAX_INVERSE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKED: tl.constexpr,
    CODES: tl.constexpr,  # of 4 bits in one store: 1, 2 in a byte or 8 in a word
    CODES_T: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Per element of a 16-bit x, 2 bytes read, and per output 1 (packed: 1/2) and 1/32 written."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    # 64-bit from here on: M * K and the strides times them exceed 2^31 in large models.
    batch = (program // (row_tiles * column_tiles)).to(tl.int64)
    row_tile = (program // column_tiles % row_tiles).to(tl.int64)
    column_tile = (program % column_tiles).to(tl.int64)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_K
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask = (first_row + rows < M)[:, None] & (first_column + columns < K)[None, :]
    if LONG_OFFSETS:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    x_tile = x_ptr + batch * stride_b + first_row * stride_m + first_column * stride_k
    x_hp = tl.load(x_tile + rows[:, None] * stride_m + columns[None, :] * stride_k, mask=mask, other=0.0)
    if ROWS:
        x = x_hp.to(tl.float32)
        BLOCKS: tl.constexpr = BLOCK_K // _SCALE_BLOCK
        places, row_mask = _scale_places(
            *(scale_ptr, batch, row_tile, column_tile, M, K, scale_size, BLOCKED, LONG_OFFSETS, BLOCK_M, BLOCKS)
        )
        amax = tl.max(magnitude_bits(x).reshape(BLOCK_M, BLOCKS, _SCALE_BLOCK), axis=2)
        byte = e8m0_from_amax_bits(amax, ROUNDING, ELEMENT_MAX_INVERSE, MAX_EXPONENT, MANTISSA_BITS)
        _store_scales(byte, places, row_mask, column_tile, K, SCALE_WORDS, BLOCKS)
        _store_data(
            *(x, byte, data_ptr, measures_ptr, batch, row_tile, column_tile, M, K),
            *(ELEMENT_MAX, FOUR_BITS, STOCHASTIC, CODES, LONG_OFFSETS, BLOCK_M, BLOCK_K),
        )
    if COLUMNS:
        BLOCKS_T: tl.constexpr = BLOCK_M // _SCALE_BLOCK
        places_t, row_mask_t = _scale_places(
            *(scale_t_ptr, batch, column_tile, row_tile, K, M, scale_t_size, BLOCKED, LONG_OFFSETS, BLOCK_K, BLOCKS_T)
        )
        # Bytes of the tile as it was loaded reach the threads that hold the transposition through memory, where they
        # have to go anyway. With a maximum in between, the compiler would exchange 8-bit codes one by one.
        amax_t = tl.max(magnitude_bits(x_hp.to(tl.float32)).reshape(BLOCKS_T, _SCALE_BLOCK, BLOCK_K), axis=1)
        byte_t = e8m0_from_amax_bits(amax_t, ROUNDING, ELEMENT_MAX_INVERSE, MAX_EXPONENT, MANTISSA_BITS)
        _store_scales(tl.trans(byte_t), places_t, row_mask_t, row_tile, M, SCALE_WORDS_T, BLOCKS_T)
        tl.debug_barrier()
        # Transposed before anything else: the compiler can then exchange 16-bit elements.
        x_t = tl.trans(x_hp).to(tl.float32)
        byte_t = _load_scales(places_t, row_mask_t, row_tile, M, SCALE_WORDS_T, BLOCKS_T)
        _store_data(
            *(x_t, byte_t, data_t_ptr, measures_ptr, batch, column_tile, row_tile, K, M),
            *(ELEMENT_MAX, FOUR_BITS, STOCHASTIC, CODES_T, LONG_OFFSETS, BLOCK_K, BLOCK_M),
        )


def mx_cast_tiles(
    x_hp: torch.Tensor,
    element: ElementFormat,
    scale_format: ScaleFormat,
    measures: torch.Tensor | None = None,
    *,
    rows: bool = True,
    columns: bool = False,
    packed: bool = False,
    blocked: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize matrices along their rows, along their columns (transposed), or both.

    Args:
        x_hp: [batch, M, K] float32, bfloat16 or float16, not empty, any strides; fast where K is contiguous. CPU
            tensors work under TRITON_INTERPRET=1.
        element: FLOAT8_E4M3, FLOAT8_E5M2 or FLOAT4_E2M1.
        scale_format: one of the E8M0 formats.
        measures: int64 [3] from `nvfp4_cast.measure` of x, to round stochastically to e2m1; None rounds to nearest.
        rows: whether to make data [batch, M, K], in blocks along K.
        columns: whether to make data_t [batch, K, M], in blocks along M.
        packed: two codes of e2m1 per byte, as `formats.pack_float4`: [batch, M, ceil(K / 2)].
        blocked: scales in tiles, as `formats.to_blocked`: [batch, blocked_size(...)].

    Returns:
        (data, scale, data_t, scale_t), contiguous, equal to formats.quantize_mx bit for bit; scales as float8_e8m0fnu.
        What is not wanted has no elements.
    """
    batch, num_rows, num_columns = x_hp.shape
    aligned = num_rows % 16 == 0 == num_columns % 16
    tile = select_tile(aligned, measures is not None and columns)
    outputs = []
    for wanted, shape in ((rows, (batch, num_rows, num_columns)), (columns, (batch, num_columns, num_rows))):
        outputs += _outputs(x_hp, shape if wanted else None, element, packed, blocked)
    scales = [outputs[1], outputs[3]]
    if blocked and tile is RAGGED_TILE:  # smaller tiles do not write the padding
        for scale in scales:
            scale.zero_()
    tiles = batch * triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_columns, tile.block_k)
    with torch.cuda.device_of(x_hp):
        _mx_cast_kernel[(tiles,)](
            *(x_hp, *outputs, measures, num_rows, num_columns, *x_hp.stride()),
            *(scale.numel() // batch for scale in scales),
            **kernel_constants(element, scale_format, blocked=blocked),
            STOCHASTIC=measures is not None,
            ROWS=rows,
            COLUMNS=columns,
            SCALE_WORDS=tile is TILE and _in_words(num_columns, blocked),
            SCALE_WORDS_T=tile is TILE and _in_words(num_rows, blocked),
            CODES=codes_per_store(num_columns, packed),
            CODES_T=codes_per_store(num_rows, packed),
            LONG_OFFSETS=max(*x_hp.stride()[1:], num_rows, num_columns) * 2 * tile.block_m >= 2**31,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    data, scale, data_t, scale_t = outputs
    return data, scale.view(torch.float8_e8m0fnu), data_t, scale_t.view(torch.float8_e8m0fnu)


def select_tile(aligned: bool, noise_of_columns: bool) -> Config:
    """The tile of a program.

    Args:
        aligned: whether rows and columns are multiples of 16.
        noise_of_columns: whether the transposition is rounded stochastically, for which the large tile would spill.
    """
    return TILE if aligned and not noise_of_columns else RAGGED_TILE


def kernel_constants(element: ElementFormat, scale_format: ScaleFormat, *, blocked: bool) -> dict[str, object]:
    """Compile-time constants of the kernel that follow from the formats."""
    return {
        "ROUNDING": scale_format.e8m0_rounding,
        "ELEMENT_MAX": element.max,
        "ELEMENT_MAX_INVERSE": 1.0 / element.max,
        "MAX_EXPONENT": element.max_exponent,
        "MANTISSA_BITS": element.mantissa_bits,
        "FOUR_BITS": element.stored_as_codes,
        "BLOCKED": blocked,
    }


def codes_per_store(size: int, packed: bool) -> int:
    """How many codes of 4 bits a store has, for rows of this size."""
    return 1 if not packed else 2 if size % 8 else 8


def _in_words(size: int, blocked: bool) -> bool:
    """Whether the scales of a row of this size are stored four at a time."""
    return blocked or size % (TILE_COLUMNS * BLOCKWISE_1X32[1]) == 0


def _outputs(
    x: torch.Tensor, shape: tuple[int, int, int] | None, element: ElementFormat, packed: bool, blocked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the data and the scales of an output, none for one left out; scales as uint8."""
    if shape is None:
        return torch.empty(0, dtype=element.dtype, device=x.device), torch.empty(0, dtype=torch.uint8, device=x.device)
    batch, num_rows, num_columns = shape
    data_shape = (batch, num_rows, (num_columns + 1) // 2) if packed else shape
    scales = scale_shape(shape, BLOCKWISE_1X32)
    if blocked:
        scales = (batch, blocked_size(*scales[1:]))
    data = torch.empty(data_shape, dtype=element.dtype, device=x.device)
    return data, torch.empty(scales, dtype=torch.uint8, device=x.device)
