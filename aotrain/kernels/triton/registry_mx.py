"""The MX cast kernels at the configurations they ship with, for `registry`."""

from collections.abc import Iterator
from typing import Any

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS
from aotrain.kernels.triton import mx_cast, mx_transform_cast
from aotrain.kernels.triton.kernel_variant import POINTER_OF_ELEMENT, KernelVariant

_POINTER = POINTER_OF_ELEMENT | {"float4_e2m1fn": "*u8"}


def mx_casts() -> Iterator[KernelVariant]:
    """Each way to cast to mxfp8 and mxfp4 from bfloat16, into row-major scales and into tiles; roundings and dtypes."""
    for rows, columns in ((True, False), (False, True), (True, True)):
        yield _mx("bf16", "float8_e4m3fn", "e8m0_rceil", rows, columns, blocked=True)
        yield _mx("bf16", "float4_e2m1fn", "e8m0_rceil", rows, columns, blocked=True)
    yield _mx("bf16", "float8_e4m3fn", "e8m0_rceil", True, True)
    yield _mx("bf16", "float8_e4m3fn", "e8m0_rceil", True, True, ragged=True)
    for scale in ("e8m0_floor", "e8m0_ceil", "e8m0_even"):
        yield _mx("bf16", "float4_e2m1fn", scale, True, True, blocked=True)
    for dtype in ("fp16", "fp32"):
        yield _mx(dtype, "float8_e5m2", "e8m0_floor", True, True)
    for dtype, blocked in (("bf16", False), ("bf16", True), ("fp32", False)):
        yield _mx(dtype, "float4_e2m1fn", "e8m0_rceil", True, False, stochastic=True, blocked=blocked)
    yield _mx("bf16", "float4_e2m1fn", "e8m0_rceil", True, True, stochastic=True, ragged=True)


def mx_transform_casts() -> Iterator[KernelVariant]:
    """Both operands of grad_weight in recipe mxfp4; tiles of scales with packed codes, float32 and any sizes."""
    yield _transform("bf16", "e8m0_even")
    for dtype, blocked, ragged in (
        ("bf16", False, False),
        ("bf16", True, False),
        ("fp32", False, False),
        ("bf16", False, True),
    ):
        yield _transform(dtype, "e8m0_rceil", stochastic=True, blocked=blocked, ragged=ragged)


def _mx(
    dtype: str,
    element: str,
    scale: str,
    rows: bool,
    columns: bool,
    *,
    stochastic: bool = False,
    blocked: bool = False,
    ragged: bool = False,
) -> KernelVariant:
    """`blocked` scales go with packed codes, as for a product; ragged: any M and K."""
    packed = blocked and element == "float4_e2m1fn"
    tile = mx_cast.select_tile(not ragged, stochastic and columns)
    constants = {
        **mx_cast.kernel_constants(ELEMENT_FORMATS[element], SCALE_FORMATS[scale], blocked=blocked),
        "STOCHASTIC": stochastic,
        "CODES": mx_cast.codes_per_store(16, packed),
        "CODES_T": mx_cast.codes_per_store(16, packed),
        "ROWS": rows,
        "COLUMNS": columns,
        "SCALE_WORDS": tile is mx_cast.TILE,
        "SCALE_WORDS_T": tile is mx_cast.TILE,
        "LONG_OFFSETS": False,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    data = _POINTER[element]
    pointers = {"x_ptr": f"*{dtype}", "data_ptr": data, "scale_ptr": "*u8", "data_t_ptr": data, "scale_t_ptr": "*u8"}
    names = ["rows"] * rows + ["columns"] * columns + ["stochastic"] * stochastic
    return _variant(
        "mx_cast",
        f"{dtype}-{element}-{scale}-{'-'.join(names + ['blocked'] * blocked + ['ragged'] * ragged)}",
        mx_cast._mx_cast_kernel,
        pointers | ({"measures_ptr": "*i64"} if stochastic else {}),
        ("M", "K", "stride_b", "stride_m", "scale_size", "scale_t_size"),
        constants | {"stride_k": 1} | ({} if stochastic else {"measures_ptr": None}),
        tile.num_warps,
        ragged,
    )


def _transform(
    dtype: str, scale: str, *, stochastic: bool = False, blocked: bool = False, ragged: bool = False
) -> KernelVariant:
    """As `_mx`; transformed along the rows of memory."""
    block_g, block_r, num_warps = mx_transform_cast.TILE
    flags = mx_transform_cast.kernel_flags(SCALE_FORMATS[scale], stochastic=stochastic, packed=blocked, blocked=blocked)
    pointers = {"x_ptr": f"*{dtype}", "data_ptr": "*i64", "scale_ptr": "*u8"}
    names = ["stochastic"] * stochastic + ["blocked"] * blocked + ["ragged"] * ragged
    return _variant(
        "mx_transform_cast",
        "-".join([dtype, scale, *names]),
        mx_transform_cast._mx_transform_cast_kernel,
        pointers | ({"measures_ptr": "*i64"} if stochastic else {}),
        ("R", "C", "stride_b", "stride_c", "scale_size"),
        {**flags, "BLOCK_G": block_g, "BLOCK_R": block_r, "stride_r": 1}
        | ({} if stochastic else {"measures_ptr": None}),
        num_warps,
        ragged,
        scalars={"seed_word": "i64", "negative_low": "i32", "negative_high": "i32"},
    )


def _variant(
    name: str,
    variant: str,
    kernel: Any,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    constants: dict[str, object],
    num_warps: int,
    ragged: bool,
    scalars: dict[str, str] | None = None,
) -> KernelVariant:
    """All pointers, and sizes that are not ragged, are multiples of 16; scalars are anything."""
    signature = {**pointers, **dict.fromkeys(sizes, "i32"), **(scalars or {}), **dict.fromkeys(constants, "constexpr")}
    return KernelVariant(
        name=name,
        variant=variant,
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(pointers) if ragged else (*pointers, *sizes),
        num_warps=num_warps,
    )
