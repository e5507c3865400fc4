"""The NVFP4 kernels at the configurations they ship with, as fields of `registry.KernelVariant`."""

from collections.abc import Iterator
from typing import Any

from aotrain.kernels.triton import nvfp4_cast as kernels
from aotrain.kernels.triton import nvfp4_grouped_cast as grouped


def variants() -> Iterator[dict[str, Any]]:
    """What a layer launches for bfloat16 x, w and gradient; float32; ragged sizes; scales in rows and in tiles."""
    for plain, transform, checksum in ((True, False, False), (False, True, False), (True, True, True)):
        yield _measure("bf16", plain, transform, checksum)
    yield _measure("fp32", True, True, True)
    yield _along("bf16", "1x16")
    yield _along("bf16", "1x16-stochastic")
    yield _along("bf16", "16x16")
    yield _along("fp32", "1x16-stochastic")
    yield _along("bf16", "1x16-stochastic-blocked")
    yield _along("bf16", "1x16-ragged")
    yield _across("bf16", "1x16")
    yield _across("bf16", "16x16")
    yield _across("bf16", "1x16-transform")
    yield _across("bf16", "1x16-transform-stochastic")
    yield _across("fp32", "1x16-transform-stochastic")
    yield _across("bf16", "1x16-transform-stochastic-blocked")
    yield _across("bf16", "1x16-transform-ragged")
    yield _grouped_measure("bf16", True, False, False)
    yield _grouped_measure("bf16", True, True, True)
    yield _grouped_along("bf16", "nearest")
    yield _grouped_along("bf16", "stochastic")
    yield _grouped_across("bf16", "transform")
    yield _grouped_across("bf16", "transform-stochastic")
    yield _grouped_across("fp32", "stochastic")


def _measure(dtype: str, plain: bool, transform: bool, checksum: bool) -> dict[str, Any]:
    block_g, block_k, num_warps = kernels.ACROSS_TILE
    flags = {"PLAIN": plain, "TRANSFORM": transform, "CHECKSUM": checksum}
    return _fields(
        "nvfp4_measure",
        f"{dtype}-{'-'.join(name.lower() for name, on in flags.items() if on)}",
        kernels._nvfp4_measure_kernel,
        {"x_ptr": f"*{dtype}", "measures_ptr": "*i64"},
        {"M": "i32", "K": "i32", "stride_m": "i32"},
        {"negative": "i32"},
        {**flags, "stride_k": 1, "BLOCK_G": block_g, "BLOCK_K": block_k},
        num_warps,
    )


def _along(dtype: str, kind: str) -> dict[str, Any]:
    block_r, block_c, num_warps = kernels.ALONG_TILE
    return _fields(
        "nvfp4_along",
        f"{dtype}-{kind}",
        kernels._nvfp4_along_kernel,
        {"x_ptr": f"*{dtype}", "data_ptr": "*u8", **_OUTPUTS},
        {"P": "i32"} | ({} if "ragged" in kind else _SIZES | {"stride_r": "i32"}),
        {"seed_word": "i64"} | (_SIZES | {"stride_r": "i32"} if "ragged" in kind else {}),
        {**_flags(kind), "stride_c": 1, "BLOCK_R": block_r, "BLOCK_C": block_c},
        num_warps,
    )


def _across(dtype: str, kind: str) -> dict[str, Any]:
    block_g, block_r, num_warps = kernels.ACROSS_TILE
    return _fields(
        "nvfp4_across",
        f"{dtype}-{kind}",
        kernels._nvfp4_across_kernel,
        {"x_ptr": f"*{dtype}", "data_ptr": "*i64", **_OUTPUTS},
        {"P": "i32"} | ({} if "ragged" in kind else _SIZES | {"stride_c": "i32"}),
        {"seed_word": "i64", "negative": "i32"} | (_SIZES | {"stride_c": "i32"} if "ragged" in kind else {}),
        {**_flags(kind), "TRANSFORM": "transform" in kind, "stride_r": 1, "BLOCK_G": block_g, "BLOCK_R": block_r},
        num_warps,
    )


def _grouped_measure(dtype: str, plain: bool, transform: bool, checksum: bool) -> dict[str, Any]:
    block_g, block_k, num_warps = kernels.ACROSS_TILE
    flags = {"PLAIN": plain, "TRANSFORM": transform, "CHECKSUM": checksum}
    return _fields(
        "nvfp4_grouped_measure",
        f"{dtype}-{'-'.join(name.lower() for name, on in flags.items() if on)}",
        grouped._nvfp4_grouped_measure_kernel,
        {"x_ptr": f"*{dtype}", "measures_ptr": "*i64", **_BLOCK_TABLES},
        {"K": "i32", "stride_m": "i32"},
        {"num_blocks": "i32", "negative": "i32"},
        {**flags, "stride_k": 1, "BLOCK_G": block_g, "BLOCK_K": block_k},
        num_warps,
    )


def _grouped_along(dtype: str, kind: str) -> dict[str, Any]:
    block_r, block_c, num_warps = kernels.ALONG_TILE
    tables = {"level_ptr": "*fp32", "measures_ptr": "*i64", "row_group_ptr": "*i64", "bounds_ptr": "*i64"}
    return _fields(
        "nvfp4_grouped_along",
        f"{dtype}-{kind}",
        grouped._nvfp4_grouped_along_kernel,
        {"x_ptr": f"*{dtype}", "data_ptr": "*u8", "scale_ptr": "*u8", **tables},
        {"K": "i32", "P": "i32", "stride_m": "i32"},
        {"num_groups": "i32", "M": "i32", "seed_word": "i64"},
        {"STOCHASTIC": kind == "stochastic", "stride_k": 1, "BLOCK_R": block_r, "BLOCK_C": block_c},
        num_warps,
    )


def _grouped_across(dtype: str, kind: str) -> dict[str, Any]:
    block_g, block_r, num_warps = kernels.ACROSS_TILE
    tables = {"level_ptr": "*fp32", "measures_ptr": "*i64", **_BLOCK_TABLES}
    flags = {"TRANSFORM": "transform" in kind, "STOCHASTIC": "stochastic" in kind}
    return _fields(
        "nvfp4_grouped_across",
        f"{dtype}-{kind}",
        grouped._nvfp4_grouped_across_kernel,
        {"x_ptr": f"*{dtype}", "data_ptr": "*i64", "scale_ptr": "*u8", **tables},
        {"K": "i32", "stride_m": "i32"},
        {"num_blocks": "i32", "seed_word": "i64", "negative": "i32"},
        {**flags, "stride_k": 1, "BLOCK_G": block_g, "BLOCK_R": block_r},
        num_warps,
    )


_BLOCK_TABLES = {"block_group_ptr": "*i64", "bounds_ptr": "*i64", "padded_bounds_ptr": "*i64"}
_OUTPUTS = {"scale_ptr": "*u8", "global_ptr": "*fp32", "measures_ptr": "*i64"}
_SIZES = {"R": "i32", "C": "i32"}


def _flags(kind: str) -> dict[str, bool]:
    return {"SQUARE": "16x16" in kind, "STOCHASTIC": "stochastic" in kind, "BLOCKED": "blocked" in kind}


def _fields(
    name: str,
    variant: str,
    kernel: Any,
    pointers: dict[str, str],
    aligned: dict[str, str],
    others: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
) -> dict[str, Any]:
    """Pointers and the `aligned` arguments are multiples of 16, `others` are anything."""
    return {
        "name": name,
        "variant": variant,
        "kernel": kernel,
        "signature": {**pointers, **aligned, **others, **dict.fromkeys(constants, "constexpr")},
        "constants": constants,
        "aligned": (*pointers, *aligned),
        "num_warps": num_warps,
    }
