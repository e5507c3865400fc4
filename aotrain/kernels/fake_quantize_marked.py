"""Fake quantization to integer formats that finds values and saturation at once, for a backward pass that needs both.

`fake_quantize_affine_marked` leaves one bit per element, set where it has no code. With them, `clear_saturated_` is
`fake_quantize_affine_backward_`: it stores zeros, and reads neither the gradient nor x.
"""

from collections.abc import Sequence

import torch

from aotrain.formats import AffineFormat
from aotrain.kernels import _fake_quantize_cpu
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.fake_quantize import FORMAT_SCHEMA, _arguments, _cpu_takes, _format

LIBRARY.define(
    f"fake_quantize_affine_marked(Tensor x, {FORMAT_SCHEMA}) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define("clear_saturated_(Tensor(a!) grad, Tensor saturated, int? group_size) -> ()")


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


def saturated_shape(shape: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """The shape of the marks of a tensor."""
    size = shape[-1] if group_size is None else group_size
    return *shape[:-1], shape[-1] // max(size, 1), -(-size // 32)


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


def _check_saturated(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    want = saturated_shape(grad.shape, group_size)
    if tuple(saturated.shape) != want or saturated.dtype != torch.int32:
        raise ValueError(
            f"clear_saturated_ got {saturated.dtype} marks of shape {tuple(saturated.shape)} for a gradient of shape "
            f"{tuple(grad.shape)}; want int32 {want}, as fake_quantize_affine_marked returns them."
        )


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


def _fake_marked(x: torch.Tensor, *arguments: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = saturated_shape(x.shape, _format(*arguments).group_size)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.int32)


def _fake_clear_(grad: torch.Tensor, saturated: torch.Tensor, group_size: int | None) -> None:
    return None


LIBRARY.impl("fake_quantize_affine_marked", _reference_marked, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quantize_affine_marked", _cpu_marked, "CPU")
torch.library.register_fake("aotrain::fake_quantize_affine_marked", _fake_marked, lib=LIBRARY)
LIBRARY.impl("clear_saturated_", _reference_clear_, "CompositeExplicitAutograd")
LIBRARY.impl("clear_saturated_", _cpu_clear_, "CPU")
torch.library.register_fake("aotrain::clear_saturated_", _fake_clear_, lib=LIBRARY)
