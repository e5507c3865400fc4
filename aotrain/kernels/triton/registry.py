"""Every Triton kernel at every configuration it ships with, as data for ahead-of-time compilation.

A new kernel adds one function to `KERNELS`. `scripts/compile_kernels.py` compiles the list for each GPU architecture on
machines without a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    ELEMENT_FORMATS,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
)
from aotrain.formats.scaling import Block
from aotrain.kernels._padding import UNPADDED, Multiples
from aotrain.kernels.adam import AdamScalars
from aotrain.kernels.triton import (
    _adam_launch,
    registry_mx,
    registry_nvfp4,
    scaled_cast,
    scaled_cast_amax,
    scaled_cast_tiles,
    sum_rows,
    token_permute,
)
from aotrain.kernels.triton._adam_launch import FLOAT32_BLOCK, Class
from aotrain.kernels.triton.adam import adam_kernel
from aotrain.kernels.triton.kernel_variant import POINTER_OF_ELEMENT, KernelVariant
from aotrain.kernels.triton.registry_fake_quantize import fake_quantize
from aotrain.kernels.triton.registry_grouped import GROUPED_KERNELS

_AMAX_FLAGS = {"OF_TENSOR": TENSORWISE, "OF_ROWS": ROWWISE, "OF_COLUMNS": COLWISE}


def scaled_cast_rowwise() -> Iterator[KernelVariant]:
    """All tiles for the training recipe's format from bfloat16; the other formats and dtypes at one tile each."""
    rows = [(config, True) for config in scaled_cast.ROW_MAJOR_CONFIGS] + [(scaled_cast.LONG_ROW_CONFIG, False)]
    for config, row_fits in rows:
        yield _rowwise("bf16", "float8_e4m3fn", "float32_pow2", config, row_fits)
    middle = scaled_cast.ROW_MAJOR_CONFIGS[len(scaled_cast.ROW_MAJOR_CONFIGS) // 2]
    for dtype in ("bf16", "fp16", "fp32"):
        for element in POINTER_OF_ELEMENT:
            yield _rowwise(dtype, element, "float32", middle, True)
    yield _rowwise("bf16", "float8_e4m3fn", "float32_pow2", middle, True, pad=(16, 16))


def adam() -> Iterator[KernelVariant]:
    """Every state format on its fastest path, and for 8-bit state all roundings, dtypes and paths."""
    whole = Class(FLAT=True, WHOLE=True, ALIGNED=True, ROUNDING="nearest")
    ragged = Class(FLAT=False, WHOLE=False, ALIGNED=True, ROUNDING="nearest")
    for state, block_size in (("dynamic8", 256), ("dynamic4", 128), ("float8_e4m3fn", 256), ("float32", FLOAT32_BLOCK)):
        yield _adam("bf16", state, block_size, whole)
    yield _adam("fp32", "dynamic8", 256, whole)
    yield _adam("bf16", "dynamic8", 256, whole._replace(ROUNDING="stochastic8"))
    yield _adam("bf16", "dynamic8", 256, ragged)
    yield _adam("bf16", "dynamic4", 128, ragged._replace(ALIGNED=False))
    yield _adam("bf16", "dynamic8", 256, ragged._replace(ALIGNED=False, ROUNDING="stochastic"))


def amax() -> Iterator[KernelVariant]:
    """The maxima that tensorwise, transposed rowwise, and rowwise both ways begin with."""
    for blocks in ((TENSORWISE,), (COLWISE,), (ROWWISE, COLWISE)):
        yield _amax("bf16", blocks)
    yield _amax("fp32", (ROWWISE, COLWISE))


def _adam(dtype: str, state: str, block_size: int, shared: Class) -> KernelVariant:
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    constants = _adam_launch.kernel_constants(torch_dtype, torch_dtype, state, block_size, shared)
    constants |= {"MAXIMIZE": False, "COUPLED": False}
    pointers = {"table_ptr": "*i64", "tile_ptr": "*i32", "key_ptr": "*i64", "maps_ptr": "*i32"}
    scalars = dict.fromkeys(AdamScalars._fields, "fp32")
    path = "whole" if shared.WHOLE else "ragged" if shared.ALIGNED else "unaligned"
    return KernelVariant(
        name="adam",
        variant=f"{dtype}-{state}-{block_size}-{path}-{shared.ROUNDING}",
        kernel=adam_kernel,
        signature=pointers | scalars | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=tuple(pointers),
        num_warps=_adam_launch.NUM_WARPS,
    )


def scaled_cast_of_tiles() -> Iterator[KernelVariant]:
    """Each cast of each recipe from bfloat16; a number of rows that vectors do not fit; other formats and dtypes."""
    for block, block_t in (
        (TENSORWISE, None),
        (None, TENSORWISE),
        (TENSORWISE, TENSORWISE),
        (None, ROWWISE),
        (ROWWISE, ROWWISE),
        (BLOCKWISE_1X128, None),
        (None, BLOCKWISE_1X128),
        (BLOCKWISE_1X128, BLOCKWISE_1X128),
        (BLOCKWISE_128X128, None),
        (None, BLOCKWISE_128X128),
        (BLOCKWISE_128X128, BLOCKWISE_128X128),
    ):
        yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", block, block_t)
    for block in (TENSORWISE, ROWWISE, BLOCKWISE_1X128):
        yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", block, block, ragged=True)
    for block in (TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, BLOCKWISE_128X128):
        yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", block, None, given_amax=True)
    yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", None, BLOCKWISE_1X128, given_amax=True)
    for block, pad in ((TENSORWISE, (16, 1)), (ROWWISE, (16, 1)), (ROWWISE, (16, 16)), (BLOCKWISE_1X128, (128, 1))):
        yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", block, block, pad=pad)
    yield _tiles("bf16", "float8_e4m3fn", "float32_pow2", ROWWISE, ROWWISE, long_offsets=True)
    yield _tiles("bf16", "float8_e5m2", "float32", TENSORWISE, TENSORWISE)
    yield _tiles("bf16", "int8", "float32", ROWWISE, ROWWISE)
    for dtype in ("fp16", "fp32"):
        yield _tiles(dtype, "float8_e4m3fn", "float32_pow2", ROWWISE, ROWWISE)


def token_permutation() -> Iterator[KernelVariant]:
    """Indices for 8 and 64 ranks of 8 experts; rows of values, of codes, of scales, and of an odd length."""
    pointers = {
        "counts_ptr": "*i64",
        **dict.fromkeys(("indices_ptr", "inverse_ptr", "sizes_ptr", "offsets_ptr"), "*i32"),
    }
    sizes = ("num_rows", "num_permuted", "alignment", "min_rows")
    for num_ranks in (8, 64):
        constants = token_permute.index_constants(num_ranks, 8)
        yield KernelVariant(
            name="expert_major_indices",
            variant=f"{num_ranks}-ranks-8-experts",
            kernel=token_permute._expert_major_indices_kernel,
            signature=pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr"),
            constants=constants,
            aligned=tuple(pointers),
            num_warps=token_permute.NUM_WARPS,
        )
    for dtype, columns in (("i16", 7168), ("i32", 7168), ("u8", 7168), ("u8", 224), ("u8", 100)):
        yield _gather_rows(dtype, columns)


def sums_of_rows() -> Iterator[KernelVariant]:
    """Outputs of 8 experts with weights, and gradients without."""
    for dtype, top_k, weighted in (("bf16", 8, True), ("bf16", 8, False), ("fp32", 2, True)):
        block_t, block_n = token_permute.select_tile(7168, 4)
        constants = {"TOP_K": top_k, "WEIGHTED": weighted, "BLOCK_T": block_t, "BLOCK_N": block_n}
        pointers = {"y_ptr": f"*{dtype}", "slots_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        sizes = ("T", "N", "stride_y")
        yield KernelVariant(
            name="sum_rows",
            variant=f"{dtype}-top{top_k}{'-weighted' * weighted}",
            kernel=sum_rows._sum_rows_kernel,
            signature=pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr"),
            constants=constants,
            aligned=(*pointers, *sizes),
            num_warps=token_permute.NUM_WARPS,
        )


def nvfp4_cast() -> Iterator[KernelVariant]:
    """Measuring, and casting along and across the contiguous dimension."""
    for fields in registry_nvfp4.variants():
        yield KernelVariant(**fields)


KERNELS: tuple[Callable[[], Iterator[KernelVariant]], ...] = (
    scaled_cast_rowwise,
    amax,
    scaled_cast_of_tiles,
    registry_mx.mx_casts,
    registry_mx.mx_transform_casts,
    adam,
    fake_quantize,
    *GROUPED_KERNELS,
    token_permutation,
    sums_of_rows,
    nvfp4_cast,
)


def _gather_rows(dtype: str, columns: int) -> KernelVariant:
    block_m, block_k = token_permute.select_tile(columns, int(dtype[1:]) // 8)
    ragged = columns % 16 != 0
    sizes = ("K", "stride_m")
    constants = {"BLOCK_M": block_m, "BLOCK_K": block_k}
    pointers = {"x_ptr": f"*{dtype}", "indices_ptr": "*i32", "y_ptr": f"*{dtype}"}
    return KernelVariant(
        name="gather_rows",
        variant=f"{dtype}-{block_m}x{block_k}{'-ragged' * ragged}",
        kernel=token_permute._gather_rows_kernel,
        signature=pointers | dict.fromkeys(("M", *sizes), "i32") | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=(*pointers, *(() if ragged else sizes)),
        num_warps=token_permute.NUM_WARPS,
    )


def _rowwise(
    dtype: str,
    element: str,
    scale: str,
    config: scaled_cast.Config,
    row_fits: bool,
    pad: Multiples = UNPADDED,
) -> KernelVariant:
    constants = {
        **scaled_cast.kernel_constants(ELEMENT_FORMATS[element], SCALE_FORMATS[scale]),
        "PAD_M": pad[0],
        "PAD_K": pad[1],
        "ROW_FITS_TILE": row_fits,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
    pointers = {"x_ptr": f"*{dtype}", "data_ptr": POINTER_OF_ELEMENT[element], "scale_ptr": "*fp32"}
    return _variant(
        "scaled_cast_rowwise",
        f"{dtype}-{element}-{scale}-rows-{config.block_m}x{config.block_k}-{1 if row_fits else 2}pass"
        + _padded_name(pad),
        scaled_cast._scaled_cast_rowwise_kernel,
        pointers,
        ("M", "K", "stride_m"),
        constants,
        config.num_warps,
        unaligned=_ragged_sizes(pad),
    )


def _amax(dtype: str, blocks: tuple[Block, ...]) -> KernelVariant:
    tile = scaled_cast_amax.AMAX_TILE
    wanted = {name: block in blocks for name, block in _AMAX_FLAGS.items()}
    names = "-".join(name.removeprefix("OF_").lower() for name, on in wanted.items() if on)
    return _variant(
        "amax",
        f"{dtype}-{names}",
        scaled_cast_amax._amax_kernel,
        {"x_ptr": f"*{dtype}", **dict.fromkeys(("tensor_ptr", "rows_ptr", "columns_ptr"), "*i32")},
        ("M", "K", "stride_b", "stride_m", "rows_per_program"),
        wanted | {"LONG_OFFSETS": False, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
        tile.num_warps,
    )


def _tiles(
    dtype: str,
    element: str,
    scale: str,
    block: Block | None,
    block_t: Block | None,
    *,
    ragged: bool = False,
    long_offsets: bool = False,
    given_amax: bool = False,
    pad: Multiples = UNPADDED,
) -> KernelVariant:
    """`block` of the matrix, `block_t` of its transposition, each in its own coordinates. ragged: any M. pad: of x."""
    data, amax = POINTER_OF_ELEMENT[element], {True: "*i32", False: "*fp32"}
    rows, columns = block or (0, 0)
    columns_t, rows_t = block_t or (0, 0)
    tile = scaled_cast_tiles.select_tile((rows, columns), (rows_t, columns_t), vectors=not ragged and pad == UNPADDED)
    constants = {
        **scaled_cast.kernel_constants(ELEMENT_FORMATS[element], SCALE_FORMATS[scale]),
        **dict(zip(("ROWS", "COLUMNS", "ROWS_T", "COLUMNS_T"), (rows, columns, rows_t, columns_t), strict=True)),
        "GIVEN_AMAX": given_amax,
        **dict.fromkeys(("PAD_M", "PAD_M_T"), pad[0]),
        **dict.fromkeys(("PAD_K", "PAD_K_T"), pad[1]),
        "LONG_OFFSETS": long_offsets,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    pointers = {"x_ptr": f"*{dtype}", "data_ptr": data, "scale_ptr": "*fp32"}
    pointers["amax_ptr"] = amax[-1 in (rows, columns) or (given_amax and block is not None)]
    pointers |= {
        "data_t_ptr": data,
        "scale_t_ptr": "*fp32",
        "amax_t_ptr": amax[-1 in (rows_t, columns_t) or columns_t == 1],
    }
    names = ([_block_name(block)] if block else []) + ([f"{_block_name(block_t)}-of-t"] if block_t else [])
    names += ["ragged"] * ragged + ["long"] * long_offsets + ["given"] * given_amax
    return _variant(
        "scaled_cast_tiles",
        f"{dtype}-{element}-{scale}-{'-'.join(names)}{_padded_name(pad)}",
        scaled_cast_tiles._scaled_cast_tiles_kernel,
        pointers,
        ("M", "K", "stride_b", "stride_m"),
        constants,
        tile.num_warps,
        unaligned=("M",) if ragged else _ragged_sizes(pad),
    )


def _padded_name(pad: Multiples) -> str:
    return "" if pad == UNPADDED else f"-padded-{pad[0]}x{pad[1]}"


def _ragged_sizes(pad: Multiples) -> tuple[str, ...]:
    """What is no multiple of 16 where it is padded; the stride of a row with it."""
    return ("M",) * (pad[0] > 1) + ("K", "stride_b", "stride_m") * (pad[1] > 1)


def _block_name(block: Block) -> str:
    return str(Scaling(element=ELEMENT_FORMATS["int8"], block=block)).rpartition("/")[2]


def _variant(
    name: str,
    variant: str,
    kernel: Any,
    pointers: Mapping[str, str],
    sizes: tuple[str, ...],
    constants: Mapping[str, Any],
    num_warps: int,
    unaligned: tuple[str, ...] = (),
) -> KernelVariant:
    """A kernel of a row-major x, with all pointers and sizes multiples of 16 but for those that are `unaligned`.

    The launcher turns the stride of 1 into a constant, which is what makes the loads of a row vectors.
    """
    constants = {**constants, "stride_k": 1}
    return KernelVariant(
        name=name,
        variant=variant,
        kernel=kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=tuple(name for name in (*pointers, *sizes) if name not in unaligned),
        num_warps=num_warps,
    )
