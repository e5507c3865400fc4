"""The Triton kernels of grouped rows, at every configuration they ship with; part of `registry`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from aotrain.formats import BLOCKWISE_1X128, ELEMENT_FORMATS, ROWWISE, SCALE_FORMATS
from aotrain.formats.scaling import Block
from aotrain.kernels.triton import grouped_cast, grouped_mm, groups
from aotrain.kernels.triton.kernel_variant import POINTER_OF_ELEMENT, KernelVariant
from aotrain.kernels.triton.scaled_cast import kernel_constants
from aotrain.kernels.triton.scaled_cast_amax import AMAX_TILE
from aotrain.kernels.triton.scaled_cast_tiles import SQUARE_TILE, WIDE_TILE

# Of the experts of a large model; vectors over groups are the only thing that depends on it.
_BLOCK_E = 128
_SCALES = {0: "row-scales", 1: "1x128", 128: "1x128-128x128"}
_NAMES: dict[Block | None, str] = {None: "none", ROWWISE: "rowwise", BLOCKWISE_1X128: "1x128"}


def group_layouts() -> Iterator[KernelVariant]:
    """Layout of few and of many groups, and sums over groups."""
    for num_groups in (_BLOCK_E, 1024):
        yield _variant(
            "group_layout",
            f"{num_groups}-groups",
            groups._group_layout_kernel,
            dict.fromkeys(("offsets_ptr", "ends_ptr", "padded_ends_ptr"), "*i32"),
            ("num_groups", "rows", "align"),
            {"BLOCK_E": num_groups},
        )
    for dtype in ("bf16", "fp32"):
        yield _variant(
            "group_sum",
            dtype,
            groups._group_sum_kernel,
            {"x_ptr": f"*{dtype}", "ends_ptr": "*i32", "sums_ptr": f"*{dtype}"},
            ("N", "stride_m"),
            {"BLOCK_M": groups._SUM_ROWS, "BLOCK_N": groups._SUM_COLUMNS, "stride_n": 1},
        )


def grouped_casts() -> Iterator[KernelVariant]:
    """The recipes' casts of grouped rows, and their maxima."""
    for dtype, of_rows in (("bf16", False), ("bf16", True), ("fp32", True)):
        yield _variant(
            "grouped_amax",
            f"{dtype}-{'rows-' * of_rows}columns",
            grouped_cast._grouped_amax_kernel,
            {"x_ptr": f"*{dtype}", **dict.fromkeys(("ends_ptr", "rows_ptr", "columns_ptr"), "*i32")},
            ("num_groups", "K", "stride_m"),
            {
                "OF_ROWS": of_rows,
                "LONG_OFFSETS": False,
                "ROWS": grouped_cast.AMAX_ROWS,
                "BLOCK_M": AMAX_TILE.block_m,
                "BLOCK_K": AMAX_TILE.block_k,
                "BLOCK_E": _BLOCK_E,
                "stride_k": 1,
            },
            AMAX_TILE.num_warps,
        )
    for block, block_t in (
        (None, ROWWISE),
        (ROWWISE, ROWWISE),
        (None, BLOCKWISE_1X128),
        (BLOCKWISE_1X128, BLOCKWISE_1X128),
    ):
        yield _cast("bf16", "float8_e4m3fn", "float32_pow2", block, block_t)
    yield _cast("bf16", "float8_e4m3fn", "float32_pow2", ROWWISE, ROWWISE, long_offsets=True)
    yield _cast("bf16", "float8_e5m2", "float32", ROWWISE, ROWWISE)
    yield _cast("bf16", "int8", "float32", ROWWISE, ROWWISE)
    for dtype in ("fp16", "fp32"):
        yield _cast(dtype, "float8_e4m3fn", "float32_pow2", ROWWISE, ROWWISE)


def grouped_mms() -> Iterator[KernelVariant]:
    """Each product of the recipes in the tiles it runs in; a K that 128 does not divide; other formats."""
    for config in grouped_mm.CONFIGS:
        for scaled_rows in (0, 128):
            yield _rows("fp8e4nv", "bf16", scaled_rows, config)
        yield _contracted("fp8e4nv", "bf16", 0, config)
        yield _rows("i8", "bf16", 0, config)
    vectors = grouped_mm.select_config(1024, 1)
    yield _rows("fp8e4nv", "bf16", 1, vectors)
    yield _contracted("fp8e4nv", "bf16", 1, vectors)
    yield _contracted("fp8e4nv", "fp32", 1, vectors)
    large = grouped_mm.CONFIGS[0]
    yield _rows("fp8e4nv", "bf16", 0, large, fast_accum=True)
    yield _rows("fp8e5", "fp32", 0, large)
    yield _rows("fp8e4nv", "bf16", 128, large, even_k=False)
    yield _contracted("i8", "bf16", 0, large)


def _rows(
    element: str,
    out: str,
    scaled_rows: int,
    config: grouped_mm.MMConfig,
    *,
    even_k: bool = True,
    fast_accum: bool = False,
) -> KernelVariant:
    names = [element, out, _SCALES[scaled_rows], f"{config.block_m}-rows"]
    constants = _mm_constants(element, config, fast_accum)
    return _variant(
        "grouped_mm",
        "-".join(names + ["ragged"] * (not even_k) + ["fast"] * fast_accum),
        grouped_mm._grouped_mm_kernel,
        {**_mm_pointers(element, out), "ends_ptr": "*i32"},
        ("num_groups", "M", "N", "K"),
        {**constants, "SCALED_ROWS": scaled_rows, "EVEN_K": even_k, "BLOCK_E": _BLOCK_E},
        config.num_warps,
        config.num_stages,
    )


def _contracted(element: str, out: str, scaled_rows: int, config: grouped_mm.MMConfig) -> KernelVariant:
    return _variant(
        "grouped_mm_contracted",
        f"{element}-{out}-{_SCALES[scaled_rows]}-{config.block_m}-rows",
        grouped_mm._grouped_mm_contracted_kernel,
        {**_mm_pointers(element, out), "padded_ends_ptr": "*i32"},
        ("M_PAD", "N", "K"),
        {**_mm_constants(element, config, False), "SCALED_ROWS": scaled_rows},
        config.num_warps,
        config.num_stages,
    )


def _mm_pointers(element: str, out: str) -> dict[str, str]:
    codes = {"a_ptr": f"*{element}", "a_scale_ptr": "*fp32", "b_ptr": f"*{element}", "b_scale_ptr": "*fp32"}
    return codes | {"out_ptr": f"*{out}"}


def _mm_constants(element: str, config: grouped_mm.MMConfig, fast_accum: bool) -> dict[str, Any]:
    return grouped_mm.kernel_constants(config, torch.int8 if element == "i8" else torch.float8_e4m3fn, fast_accum)


def _cast(
    dtype: str, element: str, scale: str, block: Block | None, block_t: Block, *, long_offsets: bool = False
) -> KernelVariant:
    data = POINTER_OF_ELEMENT[element]
    tile = SQUARE_TILE if BLOCKWISE_1X128 in (block, block_t) else WIDE_TILE
    pointers = {"x_ptr": f"*{dtype}", "ends_ptr": "*i32", "padded_ends_ptr": "*i32"}
    pointers |= {"data_ptr": data, "scale_ptr": "*fp32", "row_amax_ptr": "*i32"}
    pointers |= {"data_t_ptr": data, "scale_t_ptr": "*fp32", "column_amax_ptr": "*i32"}
    return _variant(
        "grouped_cast",
        f"{dtype}-{element}-{scale}-{_NAMES[block]}-{_NAMES[block_t]}-of-t{'-long' * long_offsets}",
        grouped_cast._grouped_cast_kernel,
        pointers,
        ("num_groups", "M_PAD", "K", "stride_m"),
        {
            **kernel_constants(ELEMENT_FORMATS[element], SCALE_FORMATS[scale]),
            "ROWS": 0 if block is None else block[1],
            "COLUMNS": block_t[1],
            "LONG_OFFSETS": long_offsets,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "BLOCK_E": _BLOCK_E,
            "stride_k": 1,
        },
        tile.num_warps,
    )


def _variant(
    name: str,
    variant: str,
    kernel: Any,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int | None = None,
) -> KernelVariant:
    """With pointers and sizes multiples of 16, but for the number of groups, and the stride of 1 a constant.

    A product, which has stages, is compared by error, not by bits, and may fuse its additions.
    """
    return KernelVariant(
        name=name,
        variant=variant,
        kernel=kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        aligned=tuple(name for name in (*pointers, *sizes) if name not in ("num_groups", "M")),
        num_warps=num_warps,
        options={"enable_fp_fusion": False} if num_stages is None else {"num_stages": num_stages},
    )


GROUPED_KERNELS: tuple[Callable[[], Iterator[KernelVariant]], ...] = (group_layouts, grouped_casts, grouped_mms)
