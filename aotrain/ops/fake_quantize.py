"""Fake quantization with straight-through gradients, alone and inside of a linear layer.

Forward replaces a tensor by the values of its codes. Backward takes the gradient of those values for the gradient of
the tensor, in the dtype that it comes in, except for elements that saturated, which get zero: scales are not
differentiated.

Nothing but the tensors themselves is kept for backward. `fake_quantized_linear` keeps the layer's input and parameters,
as a plain linear layer does, and makes the values again: no copy of the weight and no mask lives between the passes.
Within backward, whoever makes the values may leave marks of what saturated for the gradient that comes later. On a CPU
the memory of the last values, at most 64 MiB of a thread, is kept to be written again (`kernels._buffers`).
"""

from typing import Any, Protocol

import torch


class FakeQuantizer(Protocol):
    """What a scheme of a tensor must do for training; see `quantization.schemes.TensorScheme`."""

    def values(self, x: torch.Tensor) -> torch.Tensor: ...

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...

    def marked_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.values(x), None

    def pass_gradient_(
        self, grad: torch.Tensor, x: torch.Tensor, saturated: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.pass_gradient(grad, x)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantizer: FakeQuantizer) -> torch.Tensor:
        ctx.quantizer = quantizer
        ctx.save_for_backward(x)
        return quantizer.values(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.quantizer.pass_gradient(grads[0], x), None


def fake_quantize(x: torch.Tensor, quantizer: FakeQuantizer) -> torch.Tensor:
    """The values that x takes when it is quantized, in x's shape and dtype, with a straight-through gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return quantizer.values(x)
    return _FakeQuantize.apply(x, quantizer)


class _FakeQuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: FakeQuantizer | None,
        weight_quantizer: FakeQuantizer | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.activation, ctx.weight_quantizer, ctx.dtype = activation, weight_quantizer, dtype
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = _values(weight, weight_quantizer, dtype)
        return torch.nn.functional.linear(_values(x, activation, dtype), w, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grads
        x, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = x_values = x_marks = w_marks = None
        if ctx.needs_input_grad[1]:
            x_values, x_marks = _marked_values(x, ctx.activation, ctx.dtype)
        if ctx.needs_input_grad[0]:
            w_values, w_marks = _marked_values(weight, ctx.weight_quantizer, ctx.dtype)
            grad_input = grad_output @ w_values
            del w_values  # before the gradient of its size is there
            grad_input = _pass(grad_input.to(x.dtype), x, ctx.activation, x_marks)
        rows = grad_output.flatten(0, -2)
        if x_values is not None:
            grad_weight = rows.t() @ x_values.flatten(0, -2)
            grad_weight = _pass(grad_weight.to(weight.dtype), weight, ctx.weight_quantizer, w_marks)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None


def fake_quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: FakeQuantizer | None,
    weight_quantizer: FakeQuantizer | None,
) -> torch.Tensor:
    """`fq(x)[..., K] @ fq(weight)[N, K].T + bias`, with straight-through gradients.

    Under autocast the product is in autocast's dtype, and quantization is of the tensors as they come, as if the layer
    were `F.linear(fq(x), fq(weight), bias)`.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N], or None.
        activation: quantizer of x, or None.
        weight_quantizer: quantizer of the weight, or None.
    """
    device = x.device.type
    under_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if under_autocast else x.dtype
    if x.dim() == 1:
        return fake_quantized_linear(x.unsqueeze(0), weight, bias, activation, weight_quantizer).squeeze(0)
    arguments = (x, weight, bias, activation, weight_quantizer, dtype)
    if not under_autocast:
        return _FakeQuantizedLinear.apply(*arguments)
    with torch.autocast(device, enabled=False):
        return _FakeQuantizedLinear.apply(*arguments)


def _values(x: torch.Tensor, quantizer: FakeQuantizer | None, dtype: torch.dtype) -> torch.Tensor:
    return (x if quantizer is None else quantizer.values(x)).to(dtype)


def _marked_values(
    x: torch.Tensor, quantizer: FakeQuantizer | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    values, saturated = (x, None) if quantizer is None else quantizer.marked_values(x)
    return values.to(dtype), saturated


def _pass(
    grad: torch.Tensor, x: torch.Tensor, quantizer: FakeQuantizer | None, saturated: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of x from a product that nobody else has."""
    return grad if quantizer is None else quantizer.pass_gradient_(grad, x, saturated)
