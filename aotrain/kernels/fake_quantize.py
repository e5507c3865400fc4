"""Fake quantization to integer formats: values of the codes, and their straight-through gradient, in one pass each.

    values(x)         = dequantize(quantize(x))                               (formats.AffineFormat)
    backward(grad, x) = grad where x has a code without saturating, else 0

Backward finds scales and saturation again from x: nothing is kept for it but x. Both have the bits of `AffineFormat`.
With `_with_scales`, scales have their gradient too (`formats.scale_gradient`). Where a backward pass makes values
anyway, `fake_quantize_marked` finds both at once.

On CUDA, a Triton kernel; on CPU, a C++ kernel (`_fake_quantize_cpu`): both for zero points that are codes or absent,
with arithmetic in float32 or the dtype of x. Everything else runs the definition.
"""

import functools

import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.formats.scale_gradient import follows_maximum, gradient_with_scales
from aotrain.kernels import _fake_quantize_cpu
from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

FORMAT_SCHEMA = (
    "int quant_min, int quant_max, int? group_size, str mapping, str domain, ScalarType? scale_dtype=None,"
    " ScalarType? compute_dtype=None, float? eps=None"
)
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIBRARY.define(f"fake_quantize_affine(Tensor x, {FORMAT_SCHEMA}) -> Tensor", tags=_TAGS)
LIBRARY.define(f"fake_quantize_affine_backward(Tensor grad, Tensor x, {FORMAT_SCHEMA}) -> Tensor", tags=_TAGS)
LIBRARY.define(f"fake_quantize_affine_backward_(Tensor(a!) grad, Tensor x, {FORMAT_SCHEMA}) -> ()", tags=_TAGS)
for suffix, result, grad in (("", "Tensor", "Tensor grad"), ("_", "()", "Tensor(a!) grad")):
    LIBRARY.define(
        f"fake_quantize_affine_backward_with_scales{suffix}({grad}, Tensor x, {FORMAT_SCHEMA}) -> {result}", tags=_TAGS
    )

# What an op takes for an AffineFormat.
_Arguments = tuple[int, int, int | None, str, str, torch.dtype | None, torch.dtype | None, float | None]


def fake_quantize_affine(x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """Values of the codes of a tensor: `form.dequantize(form.quantize(x), x.dtype)`, contiguous.

    Args:
        x: [..., K] float32, bfloat16 or float16, any strides; K a multiple of the group size.
        form: the integer format.

    Raises:
        ValueError: another dtype, or a K that the group size does not divide.
    """
    return torch.ops.aotrain.fake_quantize_affine(x, *_arguments(form))


def fake_quantize_affine_backward(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """Straight-through gradient of x: `grad` where x's code does not saturate, else 0; contiguous.

    Args:
        grad: gradient of the values, in the shape of x, any floating dtype.
        x: [..., K] as for `fake_quantize_affine`.
        form: the integer format.

    Raises:
        ValueError: grad has another shape than x, or as for `fake_quantize_affine`.
    """
    return torch.ops.aotrain.fake_quantize_affine_backward(grad, x, *_arguments(form))


def fake_quantize_affine_backward_(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """`fake_quantize_affine_backward` into its first argument, which it returns: touches only what saturates."""
    torch.ops.aotrain.fake_quantize_affine_backward_(grad, x, *_arguments(form))
    return grad


def fake_quantize_affine_backward_with_scales(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """Gradient of x, scales included: `formats.scale_gradient.gradient_with_scales`; contiguous.

    Args:
        grad: gradient of the values, in the shape of x, any floating dtype.
        x: [..., K] as for `fake_quantize_affine`.
        form: a symmetric format without zero points.

    Raises:
        ValueError: another mapping, or as for `fake_quantize_affine_backward`.
    """
    return torch.ops.aotrain.fake_quantize_affine_backward_with_scales(grad, x, *_arguments(form))


def fake_quantize_affine_backward_with_scales_(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """`fake_quantize_affine_backward_with_scales` into its first argument, which it returns."""
    torch.ops.aotrain.fake_quantize_affine_backward_with_scales_(grad, x, *_arguments(form))
    return grad


def kernel_gap(form: AffineFormat, dtype: torch.dtype) -> str | None:
    """What of a format the kernels do not do for tensors of this dtype; None when they do all of it."""
    if form.domain is ZeroPointDomain.FLOAT:
        return "there is no kernel for zero points that are values"
    if form.compute_dtype not in (None, dtype, torch.float32):
        return f"there is no kernel for {form.compute_dtype} arithmetic on {dtype}"
    if form.mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR and not form.quant_min < 0 < form.quant_max:
        return "there is no kernel for a mapping that never clips to codes of one sign"
    return None


def _arguments(form: AffineFormat) -> _Arguments:
    return (
        *(form.quant_min, form.quant_max, form.group_size, form.mapping.name, form.domain.name),
        *(form.scale_dtype, form.compute_dtype, form.eps),
    )


@functools.lru_cache(maxsize=256)
def _format(
    quant_min: int,
    quant_max: int,
    group_size: int | None,
    mapping: str,
    domain: str,
    scale_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> AffineFormat:
    return AffineFormat(
        *(quant_min, quant_max, group_size, MappingType[mapping], ZeroPointDomain[domain]),
        *(scale_dtype, compute_dtype, eps),
    )


def _reference(x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    return form.dequantize(form.quantize(x.contiguous()), x.dtype)


def _reference_backward(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    _check_grad(grad, x)
    x = x.contiguous()
    return grad.contiguous().where(form.in_range(x, *form.parameters(x)), 0)


def _reference_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    grad.copy_(_reference_backward(grad, x, *arguments))


def _reference_with_scales(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    _check_grad(grad, x)
    return gradient_with_scales(grad, x, _format(*arguments))


def _reference_with_scales_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    grad.copy_(_reference_with_scales(grad, x, *arguments))


def _check_grad(grad: torch.Tensor, x: torch.Tensor) -> None:
    if grad.shape != x.shape:
        raise ValueError(
            f"fake_quantize_affine_backward got a grad of shape {tuple(grad.shape)}; want that of x, {tuple(x.shape)}."
        )


def _fits(x: torch.Tensor, form: AffineFormat) -> bool:
    """Whether x is what the format takes; otherwise the definition says why not."""
    size = form.group_size
    return x.dim() > 0 and x.numel() > 0 and (size is None or x.shape[-1] % size == 0)


def _cpu_takes(x: torch.Tensor, form: AffineFormat) -> bool:
    return _fits(x, form) and kernel_gap(form, x.dtype) is None and _fake_quantize_cpu.problem(x) is None


def _cpu(x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    if not _cpu_takes(x, form):
        return _reference(x, *arguments)
    return _fake_quantize_cpu.fake_quantize(x, form)


def _cpu_backward(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    if grad.shape != x.shape or grad.dtype != x.dtype or not _cpu_takes(x, form):
        return _reference_backward(grad, x, *arguments)
    return _fake_quantize_cpu.fake_quantize(x, form, grad)


def _cpu_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    form = _format(*arguments)
    if grad.shape != x.shape or grad.dtype != x.dtype or not grad.is_contiguous() or not _cpu_takes(x, form):
        grad.copy_(_cpu_backward(grad, x, *arguments))
        return
    _fake_quantize_cpu.fake_quantize(x, form, grad, out=grad)


def _cpu_with_scales(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    if not follows_maximum(form) or grad.shape != x.shape or grad.dtype != x.dtype or not _cpu_takes(x, form):
        return _reference_with_scales(grad, x, *arguments)
    return _fake_quantize_cpu.fake_quantize(x, form, grad, with_scales=True)


def _cpu_with_scales_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    form = _format(*arguments)
    takes = follows_maximum(form) and grad.shape == x.shape and grad.dtype == x.dtype and grad.is_contiguous()
    if not takes or not _cpu_takes(x, form):
        grad.copy_(_cpu_with_scales(grad, x, *arguments))
        return
    _fake_quantize_cpu.fake_quantize(x, form, grad, out=grad, with_scales=True)


def _triton_takes(x: torch.Tensor, form: AffineFormat, *, with_scales: bool = False) -> bool:
    """Whether the Triton kernel does this; warns where it is the kernel or Triton that is missing."""
    if not _fits(x, form) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False  # nothing to do, or the definition raises
    reason = kernel_gap(form, x.dtype) or triton_problem(x.device, MIN_CAPABILITY)
    if reason is None and with_scales:
        from aotrain.kernels.triton.fake_quantize import fits_tile

        if not fits_tile(form.group_size or x.shape[-1]):
            reason = "there is no kernel for gradients of the scales of groups this long"
    if reason is not None:
        warn_slow("fake_quantize_affine", reason)
    return reason is None


def _cuda(x: torch.Tensor, *arguments: int) -> torch.Tensor:
    """The Triton kernel where there is one. Tests call these with CPU tensors under Triton's interpreter."""
    form = _format(*arguments)
    if not _triton_takes(x, form):
        return _reference(x, *arguments)
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    return fake_quantize(x, form)


def _cuda_backward(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    if grad.shape != x.shape or not _triton_takes(x, form):
        return _reference_backward(grad, x, *arguments)
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    return fake_quantize(x, form, grad)


def _cuda_with_scales(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    form = _format(*arguments)
    if grad.shape != x.shape or not follows_maximum(form) or not _triton_takes(x, form, with_scales=True):
        return _reference_with_scales(grad, x, *arguments)
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    return fake_quantize(x, form, grad, with_scales=True)


def _cuda_with_scales_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    form = _format(*arguments)
    takes = grad.shape == x.shape and grad.is_contiguous() and follows_maximum(form)
    if not takes or not _triton_takes(x, form, with_scales=True):
        grad.copy_(_cuda_with_scales(grad, x, *arguments))
        return
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    fake_quantize(x, form, grad, out=grad, with_scales=True)


def _cuda_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    form = _format(*arguments)
    if grad.shape != x.shape or not grad.is_contiguous() or not _triton_takes(x, form):
        grad.copy_(_cuda_backward(grad, x, *arguments))
        return
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    fake_quantize(x, form, grad, out=grad)


def _fake(x: torch.Tensor, *arguments: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    return grad.new_empty(grad.shape)


def _fake_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    return None


LIBRARY.impl("fake_quantize_affine", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine", _cpu, "CPU")
LIBRARY.impl("fake_quantize_affine", _cuda, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine", _fake, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_backward", _reference_backward, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_backward", _cpu_backward, "CPU")
LIBRARY.impl("fake_quantize_affine_backward", _cuda_backward, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine_backward", _fake_backward, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_backward_", _reference_backward_, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_backward_", _cpu_backward_, "CPU")
LIBRARY.impl("fake_quantize_affine_backward_", _cuda_backward_, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine_backward_", _fake_backward_, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_backward_with_scales", _reference_with_scales, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_backward_with_scales", _cpu_with_scales, "CPU")
LIBRARY.impl("fake_quantize_affine_backward_with_scales", _cuda_with_scales, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine_backward_with_scales", _fake_backward, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_backward_with_scales_", _reference_with_scales_, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_backward_with_scales_", _cpu_with_scales_, "CPU")
LIBRARY.impl("fake_quantize_affine_backward_with_scales_", _cuda_with_scales_, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine_backward_with_scales_", _fake_backward_, lib=LIBRARY)
