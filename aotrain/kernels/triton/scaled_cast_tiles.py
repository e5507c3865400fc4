"""scaled_cast on a GPU by tiles: scales of any shipped block, the matrix as it lies in memory, transposed, or both.

    data[m, k]   = saturate(x[m, k] * inv_scale[block of (m, k)])
    data_t[k, m] = saturate(x[m, k] * inv_scale_t[block of (k, m)])

Bytes per element of a 16-bit x, without the scales (4 bytes per block and output):

| blocks                | one output | both outputs  | why no fewer                                                   |
|-----------------------|------------|---------------|----------------------------------------------------------------|
| 1x128, 128x1, 128x128 | 2 + 1      | 2 + 1 + 1     | a tile holds whole blocks, so x is read once                   |
| any, amax given       | 2 + 1      |               | scales need no x, which is read once                           |
| tensor, row, column   | 2 + 2 + 1  | 2 + 2 + 1 + 1 | no code is known before the last element of its block is read, |
|                       |            |               | and such blocks are larger than the memory of one processor    |

Both outputs share the reads, whatever their blocks. Of a second read, the L2 cache gives what it still holds (50 MB on
an H200: a 16-bit matrix of 4096 x 6144). Rows as they lie in memory have a kernel that reads them once
(`scaled_cast_rowwise`); here they occur together with another output, or transposed.

The transposition runs through shared memory, in the compiler's change of layout before the store, so that loads and
stores both follow the contiguous dimension. The first read is `scaled_cast_amax`'s.

This file does not do E8M0 scales, the fnuz formats or other blocks.
"""

import torch
import triton
import triton.language as tl

from aotrain.formats import BLOCKWISE_1X128, BLOCKWISE_128X128, COLWISE, ROWWISE, TENSORWISE, ElementFormat, ScaleFormat
from aotrain.formats.scaling import Block, scale_shape
from aotrain.kernels._padding import UNPADDED, Multiples, padded_shape
from aotrain.kernels.triton._numerics import magnitude_bits, saturating_cast, scales_from_amax_bits
from aotrain.kernels.triton.scaled_cast import Config, kernel_constants, needed_multiples, padded_size
from aotrain.kernels.triton.scaled_cast_amax import long_offsets, matrix_maxima, tile_offsets

# Blocks of an output, in its own coordinates.
TILE_BLOCKS: tuple[Block, ...] = (TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, (128, 1), BLOCKWISE_128X128)
# Rows, columns and warps of a tile. Blocks of 128 lie within a square of 128; other tiles are 128 bytes of both a row
# of a 16-bit x and a row of its 8-bit transposition. 64 elements per thread need 17 instructions each where 32 need 26,
# and small programs leave room for several on a processor. From compiled instruction and register counts
# (benchmarks/results/aot_kernels.csv, docs/LOG.md); not measured on a GPU yet.
SQUARE_TILE = Config(128, 128, 8)
WIDE_TILE = Config(128, 64, 4)


@triton.jit
def _block_scales(
    x,
    amax_ptr,
    rows,
    columns,
    M,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """(scale, inv_scale) of a tile's blocks of ROWS x COLUMNS, in a shape that broadcasts to the tile's.

    Blocks of whole rows, columns or matrices (-1) have their maxima at amax_ptr.
    """
    if ROWS == -1 and COLUMNS == -1:
        bits = tl.load(amax_ptr)
    elif COLUMNS == -1:
        bits = tl.load(amax_ptr + rows, mask=rows < M, other=0)[:, None]
    elif ROWS == -1:
        bits = tl.load(amax_ptr + columns, mask=columns < K, other=0)[None, :]
    elif ROWS == 1:
        bits = tl.max(magnitude_bits(x), axis=1, keep_dims=True)
    elif COLUMNS == 1:
        bits = tl.max(magnitude_bits(x), axis=0, keep_dims=True)
    else:
        bits = tl.max(tl.max(magnitude_bits(x), axis=1), axis=0)
    return scales_from_amax_bits(bits, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)


@triton.jit
def _given_scales(
    amax_ptr,
    batch,
    row_tile,
    column_tile,
    M,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`_block_scales` from [batch, scales along M, scales along K] bits of maxima in memory."""
    num_rows, num_columns = _scale_count(M, ROWS), _scale_count(K, COLUMNS)
    r = _scale_index(row_tile, ROWS, BLOCK_M)[:, None]
    c = _scale_index(column_tile, COLUMNS, BLOCK_K)[None, :]
    mask = (r < num_rows) & (c < num_columns)
    bits = tl.load(amax_ptr + (batch * num_rows + r) * num_columns + c, mask=mask, other=0)
    return scales_from_amax_bits(bits, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)


@triton.jit
def _scale_index(tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices along a dimension of the scales of a tile: one per element, or one, that of its block of SIZE."""
    if SIZE == 1:
        index = tile * BLOCK + tl.arange(0, BLOCK)
    elif SIZE == -1:
        index = tl.zeros((1,), tl.int64)
    else:
        index = tile + tl.zeros((1,), tl.int64)
    return index


@triton.jit
def _scale_count(size, BLOCK: tl.constexpr):
    """Scales along a dimension of this size."""
    if BLOCK == -1:
        count = 1
    else:
        count = tl.cdiv(size, BLOCK)
    return count


@triton.jit
def _store_scales(
    scale_ptr,
    scale,
    batch,
    row_tile,
    column_tile,
    M,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile's scales into [batch, scales along M, scales along K]."""
    num_rows, num_columns = _scale_count(M, ROWS), _scale_count(K, COLUMNS)
    # A larger block has the index of its tile: of the tiles that share a scale, the first one is within the count.
    if ROWS == 1:
        r = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    else:
        r = row_tile + tl.zeros((1, 1), tl.int64)
    if COLUMNS == 1:
        c = (column_tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    else:
        c = column_tile + tl.zeros((1, 1), tl.int64)
    offsets = (batch * num_rows + r) * num_columns + c
    tl.store(scale_ptr + offsets, scale, mask=(r < num_rows) & (c < num_columns))


@triton.jit
def _scaled_cast_tiles_kernel(
    x_ptr,  # [batch, M, K], any strides
    data_ptr,  # [batch, M, K] contiguous, 8-bit, both rounded up to multiples of PAD_M and PAD_K
    scale_ptr,  # [batch, M / ROWS, K / COLUMNS] contiguous, float32
    amax_ptr,  # bits of the maxima of whole blocks: [batch], [batch, M] or [batch, K]; of all blocks if given
    data_t_ptr,  # [batch, K, M] contiguous, both rounded up to multiples of PAD_K_T and PAD_M_T
    scale_t_ptr,  # [batch, K / COLUMNS_T, M / ROWS_T] contiguous
    amax_t_ptr,  # as amax_ptr; for blocks of 128 x 1, [batch, M / 128, K] to write and read
    M,
    K,
    stride_b,
    stride_m,
    stride_k,
    ROWS: tl.constexpr,  # block of data, in x's coordinates: 1, BLOCK, or -1 for all; 0 leaves data out
    COLUMNS: tl.constexpr,
    ROWS_T: tl.constexpr,  # the same for data_t, in x's coordinates too
    COLUMNS_T: tl.constexpr,
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    GIVEN_AMAX: tl.constexpr,  # amax_ptr or amax_t_ptr, whichever output there is, has a maximum for each scale
    PAD_M: tl.constexpr,  # 1 where M is a multiple already, or data left out
    PAD_K: tl.constexpr,
    PAD_M_T: tl.constexpr,
    PAD_K_T: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Per element of a 16-bit x, 2 bytes read and 1 written per output: the least, since x is read once for both."""
    ELEMENT: tl.constexpr = data_ptr.dtype.element_ty
    padded_m, padded_k = padded_size(M, PAD_M), padded_size(K, PAD_K)
    padded_m_t, padded_k_t = padded_size(M, PAD_M_T), padded_size(K, PAD_K_T)
    row_tiles = tl.cdiv(tl.maximum(padded_m, padded_m_t), BLOCK_M)
    column_tiles = tl.cdiv(tl.maximum(padded_k, padded_k_t), BLOCK_K)
    # Backwards: the last tiles that the maxima were taken of are still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    # 64-bit from here on: M * K and the strides times them exceed 2^31 in large models.
    batch = (program // (row_tiles * column_tiles)).to(tl.int64)
    row_tile = (program // column_tiles % row_tiles).to(tl.int64)
    column_tile = (program % column_tiles).to(tl.int64)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_K
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x_tile = x_ptr + batch * stride_b + first_row * stride_m + first_column * stride_k
    x_offsets = tile_offsets(stride_m, stride_k, LONG_OFFSETS, BLOCK_M, BLOCK_K)
    x_hp = tl.load(x_tile + x_offsets, mask=mask, other=0.0)

    if COLUMNS_T == 1 and ROWS_T > 1 and not GIVEN_AMAX:
        # Maxima of the tile as it was loaded reach the threads that hold the transposition through memory. With a
        # maximum in between, the compiler would exchange 8-bit codes one by one and divide in every thread.
        column_amax = tl.max(magnitude_bits(x_hp.to(tl.float32)), axis=0)
        tl.store(amax_t_ptr + (batch * row_tiles + row_tile) * K + columns, column_amax, mask=columns < K)
    if ROWS != 0:
        x = x_hp.to(tl.float32)
        if GIVEN_AMAX:
            scale, inv_scale = _given_scales(
                *(amax_ptr, batch, row_tile, column_tile, M, K, ROWS, COLUMNS),
                *(ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO, BLOCK_M, BLOCK_K),
            )
        else:
            amax_b = amax_ptr + batch * _maxima(M, K, ROWS, COLUMNS)
            scale, inv_scale = _block_scales(
                x, amax_b, rows, columns, M, K, ROWS, COLUMNS, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO
            )
        data = saturating_cast(x * inv_scale, ELEMENT, ELEMENT_MAX)
        data_tile = data_ptr + batch * padded_m * padded_k + first_row * padded_k + first_column
        mask = (rows < padded_m)[:, None] & (columns < padded_k)[None, :]
        tl.store(data_tile + tile_offsets(padded_k, 1, LONG_OFFSETS, BLOCK_M, BLOCK_K), data, mask=mask)
        _store_scales(
            scale_ptr, scale, batch, row_tile, column_tile, padded_m, padded_k, ROWS, COLUMNS, BLOCK_M, BLOCK_K
        )
    if ROWS_T != 0:
        tl.debug_barrier()
        # Before anything else: the compiler can then exchange 16-bit elements, four 8 x 8 matrices an instruction.
        x = tl.trans(x_hp).to(tl.float32)
        if GIVEN_AMAX:
            scale, inv_scale = _given_scales(
                *(amax_t_ptr, batch, column_tile, row_tile, K, M, COLUMNS_T, ROWS_T),
                *(ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO, BLOCK_K, BLOCK_M),
            )
        elif COLUMNS_T == 1 and ROWS_T > 1:
            amax_b = amax_t_ptr + (batch * row_tiles + row_tile) * K
            scale, inv_scale = _block_scales(
                x, amax_b, columns, rows, K, M, 1, -1, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO
            )
        elif ROWS_T == COLUMNS_T:  # one scale for the tile: of the tile as loaded, and the same both ways
            if not (ROWS == ROWS_T and COLUMNS == COLUMNS_T):
                amax_b = amax_t_ptr + batch * _maxima(M, K, ROWS_T, COLUMNS_T)
                scale, inv_scale = _block_scales(
                    x_hp.to(tl.float32),
                    amax_b,
                    rows,
                    columns,
                    M,
                    K,
                    ROWS_T,
                    COLUMNS_T,
                    ELEMENT_MAX,
                    INV_SCALE_MAX,
                    POWER_OF_TWO,
                )
        else:
            amax_b = amax_t_ptr + batch * _maxima(M, K, ROWS_T, COLUMNS_T)
            scale, inv_scale = _block_scales(
                x, amax_b, columns, rows, K, M, COLUMNS_T, ROWS_T, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO
            )
        data = saturating_cast(x * inv_scale, ELEMENT, ELEMENT_MAX)
        data_t_tile = data_t_ptr + batch * padded_m_t * padded_k_t + first_column * padded_m_t + first_row
        offsets_t = tile_offsets(padded_m_t, 1, LONG_OFFSETS, BLOCK_K, BLOCK_M)
        tl.store(data_t_tile + offsets_t, data, mask=(columns < padded_k_t)[:, None] & (rows < padded_m_t)[None, :])
        _store_scales(
            *(scale_t_ptr, scale, batch, column_tile, row_tile, padded_k_t, padded_m_t),
            *(COLUMNS_T, ROWS_T, BLOCK_K, BLOCK_M),
        )


@triton.jit
def _maxima(M, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many finished maxima a matrix has; 0 for blocks within a tile."""
    if ROWS == -1 and COLUMNS == -1:
        count = 1
    elif COLUMNS == -1:
        count = M
    elif ROWS == -1:
        count = K
    else:
        count = 0
    return count


def scaled_cast_tiles(
    x_hp: torch.Tensor,
    block: Block | None,
    block_t: Block | None,
    element: ElementFormat,
    scale_format: ScaleFormat,
    amax: torch.Tensor | None = None,
    pad: Multiples = UNPADDED,
    pad_t: Multiples = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize matrices as they are, transposed, or both.

    Args:
        x_hp: [batch, M, K] float32, bfloat16 or float16, not empty, any strides; fast where K is contiguous. CPU
            tensors work under TRITON_INTERPRET=1.
        block: one of TILE_BLOCKS for the data [batch, M, K]; None leaves that out.
        block_t: one of TILE_BLOCKS for the data [batch, K, M] of the transposition; None leaves that out.
        element: FLOAT8_E4M3, FLOAT8_E5M2 or INT8.
        scale_format: `float32` or `float32_pow2`.
        amax: float32 largest magnitudes, of the shape of x's scales, to use instead of those of x; for one output.
        pad: multiples that M and K of data are rounded up to.
        pad_t: multiples that K and M of data_t are rounded up to.

    Returns:
        (data, scale, data_t, scale_t), contiguous, equal to formats.quantize of x with zeros up to these multiples, bit
        for bit; given maxima then are 0 for what lies beyond x's blocks. What was left out has no elements.
    """
    batch, num_rows, num_columns = x_hp.shape
    shape, shape_t = padded_shape(x_hp.shape, pad), padded_shape(x_hp.mT.shape, pad_t)
    data, scale = _outputs(x_hp, shape, block, element)
    data_t, scale_t = _outputs(x_hp, shape_t, block_t, element)
    # In x's coordinates, and no more than needed: each combination is a kernel.
    pads = needed_multiples(x_hp.shape, pad if block is not None else UNPADDED)
    pads_t = needed_multiples(x_hp.mT.shape, pad_t if block_t is not None else UNPADDED)[::-1]
    sizes = zip(padded_shape(x_hp.shape, pads)[1:], padded_shape(x_hp.shape, pads_t)[1:], strict=True)
    block, block_t = block or (0, 0), block_t[::-1] if block_t is not None else (0, 0)  # in x's coordinates
    tile = select_tile(block, block_t, vectors=num_rows % 16 == 0 == num_columns % 16)
    row_tiles, column_tiles = (-(-max(size) // step) for size, step in zip(sizes, tile[:2], strict=True))
    with torch.cuda.device_of(x_hp):
        if amax is not None:
            maxima = dict.fromkeys((block, block_t), amax.contiguous().view(torch.int32))
        else:
            maxima = matrix_maxima(x_hp, {b for b in (block, block_t) if -1 in b})
            if block_t == (128, 1):  # room for those that cross within a program
                maxima[block_t] = x_hp.new_empty((batch, row_tiles, num_columns), dtype=torch.int32)
        _scaled_cast_tiles_kernel[(batch * row_tiles * column_tiles,)](
            x_hp,
            *(data, scale, maxima.get(block, scale)),
            *(data_t, scale_t, maxima.get(block_t, scale_t)),
            *(num_rows, num_columns, *x_hp.stride()),
            *(*block, *block_t),
            **kernel_constants(element, scale_format),
            GIVEN_AMAX=amax is not None,
            **dict(zip(("PAD_M", "PAD_K", "PAD_M_T", "PAD_K_T"), (*pads, *pads_t), strict=True)),
            LONG_OFFSETS=long_offsets(x_hp, tile),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return data, scale, data_t, scale_t


def select_tile(*blocks: Block, vectors: bool = True) -> Config:
    """The tile for outputs with these blocks; `vectors` where all rows begin at multiples of 16 elements."""
    tile = SQUARE_TILE if any(128 in block for block in blocks) else WIDE_TILE
    # Elements that are accessed one by one need a mask and an address each.
    return tile if vectors else tile._replace(num_warps=2 * tile.num_warps)


def _outputs(
    x: torch.Tensor, shape: tuple[int, ...], block: Block | None, element: ElementFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the data and the scales of an output, none for one left out."""
    if block is None:
        return torch.empty(0, dtype=element.dtype, device=x.device), torch.empty(0, device=x.device)
    scale = torch.empty(scale_shape(shape, block), dtype=torch.float32, device=x.device)
    return torch.empty(shape, dtype=element.dtype, device=x.device), scale
