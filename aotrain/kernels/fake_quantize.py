"""Fake quantization to integer formats: values of the codes, and their straight-through gradient, in one pass each.

    values(x)         = dequantize(quantize(x))                               (formats.AffineFormat)
    backward(grad, x) = grad where x has a code without saturating, else 0

Backward finds scales and saturation again from x: nothing is kept for it but x. Both have the bits of `AffineFormat`.
Where a backward pass needs the values too, `fake_quantize_affine_marked` finds both at once, saturation as one bit per
element, with which `clear_saturated_` is `backward` in place.

On CUDA, a Triton kernel; on CPU, a C++ kernel (`_fake_quantize_cpu`): both for zero points that are codes or absent,
with arithmetic in float32 or the dtype of x. Everything else runs the definition.
"""

import functools
from collections.abc import Sequence

import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.formats.scale_gradient import follows_maximum, gradient_with_scales
from aotrain.kernels import _fake_quantize_cpu
from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

_FORMAT = (
    "int quant_min, int quant_max, int? group_size, str mapping, str domain, ScalarType? scale_dtype=None,"
    " ScalarType? compute_dtype=None, float? eps=None"
)
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIBRARY.define(f"fake_quantize_affine(Tensor x, {_FORMAT}) -> Tensor", tags=_TAGS)
LIBRARY.define(f"fake_quantize_affine_marked(Tensor x, {_FORMAT}) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define("clear_saturated_(Tensor(a!) grad, Tensor saturated, int? group_size) -> ()")
LIBRARY.define(f"fake_quantize_affine_backward(Tensor grad, Tensor x, {_FORMAT}) -> Tensor", tags=_TAGS)
LIBRARY.define(f"fake_quantize_affine_backward_(Tensor(a!) grad, Tensor x, {_FORMAT}) -> ()", tags=_TAGS)
for suffix, result, grad in (("", "Tensor", "Tensor grad"), ("_", "()", "Tensor(a!) grad")):
    LIBRARY.define(
        f"fake_quantize_affine_backward_with_scales{suffix}({grad}, Tensor x, {_FORMAT}) -> {result}", tags=_TAGS
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


def fake_quantize_affine_marked(x: torch.Tensor, form: AffineFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`fake_quantize_affine` and what saturates, for a backward pass that makes the values anyway.

    Args:
        x: [..., K] as for `fake_quantize_affine`.
        form: the integer format.

    Returns:
        The values, and int32 [..., K / group_size, words]: bit i of word j is set where element 32 j + i of the group
        has no code. `clear_saturated_` reads it.

    Raises:
        ValueError: as for `fake_quantize_affine`.
    """
    return torch.ops.aotrain.fake_quantize_affine_marked(x, *_arguments(form))


def clear_saturated_(grad: torch.Tensor, saturated: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """Zeros into a gradient where `fake_quantize_affine_marked` found that x saturates; returns the gradient.

    Args:
        grad: gradient of the values, [..., K], any floating dtype.
        saturated: as `fake_quantize_affine_marked` returns it for a tensor of this shape.
        form: the integer format.

    Raises:
        ValueError: `saturated` is not of grad's shape.
    """
    torch.ops.aotrain.clear_saturated_(grad, saturated, form.group_size)
    return grad


def marks_pay(x: torch.Tensor) -> bool:
    """Whether marks are cheaper than finding what saturates from x again.

    On a GPU they are not: there is no kernel for them, and memory traffic is what counts.
    """
    return x.device.type == "cpu"


def kernel_gap(form: AffineFormat, dtype: torch.dtype) -> str | None:
    """What of a format the kernels do not do for tensors of this dtype; None when they do all of it."""
    if form.domain is ZeroPointDomain.FLOAT:
        return "there is no kernel for zero points that are values"
    if form.compute_dtype not in (None, dtype, torch.float32):
        return f"there is no kernel for {form.compute_dtype} arithmetic on {dtype}"
    if form.mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR and not form.quant_min < 0 < form.quant_max:
        return "there is no kernel for a mapping that never clips to codes of one sign"
    return None


@functools.lru_cache(maxsize=256)
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


def _reference_marked(x: torch.Tensor, *arguments: int) -> tuple[torch.Tensor, torch.Tensor]:
    form = _format(*arguments)
    x = x.contiguous()
    q = form.quantize(x)
    outside = ~form.in_range(x, q.scale, q.zero_point)
    groups, words = saturated_shape(x.shape, form.group_size)[-2:]
    size = x.shape[-1] if form.group_size is None else form.group_size
    bits = torch.nn.functional.pad(outside.unflatten(-1, (groups, size)), (0, 32 * words - size))
    words = (bits.unflatten(-1, (words, 32)).to(torch.int64) << torch.arange(32, device=x.device)).sum(-1)
    return form.dequantize(q, x.dtype), words.to(torch.int32)


def _reference_clear_(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    _check_saturated(grad, saturated, group_size)
    bits = (saturated[..., None] >> torch.arange(32, device=grad.device)) & 1
    size = grad.shape[-1] if group_size is None else group_size
    grad.masked_fill_(bits.flatten(-2)[..., :size].reshape(grad.shape).bool(), 0)


def saturated_shape(shape: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """The shape of the marks of a tensor."""
    size = shape[-1] if group_size is None else group_size
    return *shape[:-1], shape[-1] // max(size, 1), -(-size // 32)


def _check_saturated(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    want = saturated_shape(grad.shape, group_size)
    if tuple(saturated.shape) != want or saturated.dtype != torch.int32:
        raise ValueError(
            f"clear_saturated_ got {saturated.dtype} marks of shape {tuple(saturated.shape)} for a gradient of shape "
            f"{tuple(grad.shape)}; want int32 {want}, as fake_quantize_affine_marked returns them."
        )


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


def _cpu_marked(x: torch.Tensor, *arguments: int) -> tuple[torch.Tensor, torch.Tensor]:
    form = _format(*arguments)
    if not _cpu_takes(x, form):
        return _reference_marked(x, *arguments)
    saturated = torch.empty(saturated_shape(x.shape, form.group_size), dtype=torch.int32, device=x.device)
    return _fake_quantize_cpu.fake_quantize(x, form, saturated=saturated), saturated


def _cpu_clear_(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    _check_saturated(grad, saturated, group_size)
    if not grad.is_contiguous() or not saturated.is_contiguous() or _fake_quantize_cpu.problem(grad) is not None:
        return _reference_clear_(grad, saturated, group_size)
    return _fake_quantize_cpu.clear_saturated_(grad, saturated, group_size)


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


def _triton_takes(x: torch.Tensor, form: AffineFormat) -> bool:
    """Whether the Triton kernel does this; warns where it is the kernel or Triton that is missing."""
    if not _fits(x, form) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False  # nothing to do, or the definition raises
    reason = kernel_gap(form, x.dtype) or triton_problem(x.device, MIN_CAPABILITY)
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


def _cuda_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    form = _format(*arguments)
    if grad.shape != x.shape or not grad.is_contiguous() or not _triton_takes(x, form):
        grad.copy_(_cuda_backward(grad, x, *arguments))
        return
    from aotrain.kernels.triton.fake_quantize import fake_quantize

    fake_quantize(x, form, grad, out=grad)


def _fake(x: torch.Tensor, *arguments: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_marked(x: torch.Tensor, *arguments: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = saturated_shape(x.shape, _format(*arguments).group_size)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.int32)


def _fake_clear_(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    return None


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> torch.Tensor:
    return grad.new_empty(grad.shape)


def _fake_backward_(grad: torch.Tensor, x: torch.Tensor, *arguments: int) -> None:
    return None


LIBRARY.impl("fake_quantize_affine", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine", _cpu, "CPU")
LIBRARY.impl("fake_quantize_affine", _cuda, "CUDA")
torch.library.register_fake("aotrain::fake_quantize_affine", _fake, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_marked", _reference_marked, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_marked", _cpu_marked, "CPU")
torch.library.register_fake("aotrain::fake_quantize_affine_marked", _fake_marked, lib=LIBRARY)
LIBRARY.impl("clear_saturated_", _reference_clear_, "CompositeExplicitAutograd")
LIBRARY.impl("clear_saturated_", _cpu_clear_, "CPU")
torch.library.register_fake("aotrain::clear_saturated_", _fake_clear_, lib=LIBRARY)
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
torch.library.register_fake("aotrain::fake_quantize_affine_backward_with_scales", _fake_backward, lib=LIBRARY)
LIBRARY.impl("fake_quantize_affine_backward_with_scales_", _reference_with_scales_, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_backward_with_scales_", _cpu_with_scales_, "CPU")
torch.library.register_fake("aotrain::fake_quantize_affine_backward_with_scales_", _fake_backward_, lib=LIBRARY)
