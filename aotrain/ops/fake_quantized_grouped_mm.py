"""fake_quantized_grouped_mm: the linear layers of all experts at once, on fake-quantized tokens and weights.

With x [M, K] sorted by expert, x[e] the rows of expert e, and fq of the matrix [N, K] of each expert by itself,

    output[e]      = fq(x)[e] @ fq(weight[e].T).T       weight[e] is [K, N]
    grad_input[e]  = g[e] @ fq(weight[e].T)             straight through fq, less what saturates
    grad_weight[e] = fq(x)[e].T @ g[e]                  likewise

Values and gradients of expert e are those of `fake_quantized_linear(x[e], weight[e].T, ...)`. Groups of a scheme lie
along K however the weight is stored, since the codes are those of the matrices [out_features, in_features] that a
checkpoint has for each expert.

Kept for backward: x and the weight as they came, and nothing of one that no gradient needs. Values are made again.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from aotrain.kernels.groups import GroupLayout, group_layout
from aotrain.kernels.scaled_grouped_mm import grouped_mm, grouped_mm_contracted
from aotrain.ops.fake_quantize import FakeQuantizer
from aotrain.ops.grouped_operands import bias_gradient, bias_of_rows, check_grouped


class SwitchedFakeQuantizer(Protocol):
    """A fake quantizer that may be switched off; see `qat.FakeQuantizerBase`."""

    def arithmetic(self, x: torch.Tensor) -> FakeQuantizer | None: ...


@dataclass(frozen=True, slots=True)
class FakeQuantizedMethod:
    """What `scaled_grouped_mm` takes in the place of a `LinearRecipe` to train through quantization.

    Attributes:
        activation: of the tokens [M, K], row by row; None: left as they are.
        weight: of stacks of matrices [E, N, K], each by itself; None: left as they are.
    """

    activation: SwitchedFakeQuantizer | None
    weight: SwitchedFakeQuantizer | None

    def __str__(self) -> str:
        return f"fake-quantized weights ({self.weight}) and tokens ({self.activation})"


@dataclass(frozen=True, slots=True)
class _Options:
    activation: FakeQuantizer | None
    weight: FakeQuantizer | None
    dtype: torch.dtype


class _FakeQuantizedGroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ends: torch.Tensor,
        padded_ends: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        layout = GroupLayout(ends, padded_ends, x.shape[0], 1)
        w = _values(weight.mT, options.weight, options.dtype)  # [E, N, K]
        y = grouped_mm(_values(x, options.activation, options.dtype), w.mT, layout)
        if bias is not None:
            y = y + bias_of_rows(bias.to(y.dtype), layout)
        for_input, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if for_weight or (for_input and options.activation is not None) else None,
            weight if for_input or (for_weight and options.weight is not None) else None,
            *(ends, padded_ends),
        )
        ctx.options, ctx.dtypes = options, (x.dtype, weight.dtype)
        ctx.bias = None if bias is None else (bias.dim() == 2, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        options: _Options = ctx.options
        x, weight, ends, padded_ends = ctx.saved_tensors
        layout = GroupLayout(ends, padded_ends, grad.shape[0], 1)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grouped_mm(grad, _values(weight.mT, options.weight, options.dtype), layout).to(ctx.dtypes[0])
            if options.activation is not None:
                grad_input = options.activation.pass_gradient(grad_input, x)
        if ctx.needs_input_grad[1]:
            x_values = _values(x, options.activation, options.dtype)
            grad_weight = grouped_mm_contracted(grad, x_values, layout).to(ctx.dtypes[1])  # [E, N, K]
            if options.weight is not None:
                grad_weight = options.weight.pass_gradient(grad_weight, weight.mT)
            grad_weight = grad_weight.mT
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad, ends, *ctx.bias)
        return grad_input, grad_weight, grad_bias, None, None, None


def fake_quantized_grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    activation: FakeQuantizer | None,
    weight_quantizer: FakeQuantizer | None,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row of fq(x) times the fake-quantized matrix of its group, with straight-through gradients.

    The product is in x's dtype, under autocast in autocast's; quantization is of the tensors as they come.

    Args:
        x: [M, K], float32, bfloat16 or float16, rows sorted by group.
        weight: [E, K, N], any of these dtypes and any strides.
        offsets: int32 [E] on x's device: the row after the last of each group, in order, the last one at most M.
        activation: quantizer of x, row by row; or None.
        weight_quantizer: quantizer of stacks of matrices [E, N, K], each by itself; or None.
        bias: None, [N], or [E, N] for one per group; added in the output's dtype.

    Returns:
        [M, N]. Rows past the last group are zero, as is their gradient.

    Raises:
        ValueError: as `scaled_grouped_mm`; or a matrix that the quantizer cannot take.
        TypeError: offsets that are not int32.
    """
    check_grouped(x, weight, offsets, bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    layout = group_layout(offsets, x.shape[0], 1)
    options = _Options(activation, weight_quantizer, dtype)
    with torch.autocast(device, enabled=False):
        return cast(torch.Tensor, _FakeQuantizedGroupedMM.apply(x, weight, bias, *layout[:2], options))


def _values(x: torch.Tensor, quantizer: FakeQuantizer | None, dtype: torch.dtype) -> torch.Tensor:
    return (x if quantizer is None else quantizer.values(x)).to(dtype)
