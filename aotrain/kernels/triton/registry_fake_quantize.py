"""The Triton kernel of fake quantization at the formats and tiles it ships with, as data for compilation."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from aotrain.formats import AffineFormat, MappingType, integer_format
from aotrain.kernels.triton import fake_quantize as kernels
from aotrain.kernels.triton.kernel_variant import KernelVariant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS = replace(integer_format(8, scale_dtype=torch.float32), compute_dtype=torch.float32, eps=1e-12)


def fake_quantize() -> Iterator[KernelVariant]:
    """Weights in groups, and tokens by both mappings in one pass and in two; float32 weights; both ways."""
    asymmetric = integer_format(8, mapping=MappingType.ASYMMETRIC)
    for backward in (False, True):
        for group_size in (32, 128):
            form = integer_format(4, group_size=group_size)
            yield _variant("bf16", f"int4-g{group_size}", form, group_size, backward)
        for size in (4096, 28672):
            yield _variant("bf16", f"int8-asymmetric-row-{size}", asymmetric, size, backward)
        yield _variant("bf16", "int8-float32-row-4096", _TOKENS, 4096, backward)
        yield _variant("fp32", "int4-g32", integer_format(4, group_size=32), 32, backward)
    for dtype in ("bf16", "fp32"):
        yield _variant(dtype, "int2-g32", integer_format(2, group_size=32), 32, True, with_scales=True)


def _variant(
    dtype: str, name: str, form: AffineFormat, size: int, backward: bool, *, with_scales: bool = False
) -> KernelVariant:
    config, fits = kernels.select_config(size, with_scales=with_scales)
    constants = {
        **kernels.kernel_constants(form, _DTYPES[dtype]),
        "BACKWARD": backward,
        "WITH_SCALES": with_scales,
        "FITS_TILE": fits,
        "BLOCK_GROUPS": config.block_groups,
        "BLOCK_SIZE": config.block_size,
    }
    pointers = dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr"), f"*{dtype}")
    sizes = ("num_groups", "size")
    return KernelVariant(
        name="fake_quantize",
        variant=f"{dtype}-{name}{'-backward' * backward}{'-with-scales' * with_scales}",
        kernel=kernels._fake_quantize_kernel,
        signature=pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=(*pointers, *sizes),
        num_warps=config.num_warps,
    )
