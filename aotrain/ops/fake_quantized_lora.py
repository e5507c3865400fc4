"""fake_quantized_lora: a linear layer with a low-rank adapter whose sum is fake-quantized, which is what is served.

A server gets the adapter merged and the result quantized, so that is what training sees:

    merged = weight + scaling * lora_b @ lora_a            [N, K], rounded once to the weight's dtype
    output[M, N] = fq(x)[M, K] @ fq(merged)[N, K].T + bias

Fake-quantizing the weight alone, and adding the adapter's product to the output, trains on a grid that merging leaves.

Kept for backward: x and the parameters; the merged weight and its values are made again. Its gradient [N, K] is never
made either, since both factors' gradients are products with r rows or columns:

    grad_b[N, r] = scaling * grad_output.T @ (fq(x) @ lora_a.T)
    grad_a[r, K] = scaling * (grad_output @ lora_b).T @ fq(x)

These are straight-through for every element of the merged weight. The scheme's mask, which stops the gradient of
elements that saturate, would need the gradient [N, K]; so it is ignored here by definition, for the weight only (the
input's applies). That is the one difference from autograd of `fake_quantize(weight + scaling * lora_b @ lora_a)`, and
none for schemes that pass every gradient (float8, MX, NVFP4). A weight that is trained beside its adapter, which
is unusual, gets its gradient without the mask as well: one rule for the whole sum.
"""

from typing import Any, NamedTuple

import torch

from aotrain.ops.fake_quantize import FakeQuantizer


class _Options(NamedTuple):
    scaling: float
    activation: FakeQuantizer | None
    weight_quantizer: FakeQuantizer | None
    dtype: torch.dtype


def low_rank_delta(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * lora_b[N, r] @ lora_a[r, K]` in float32, whatever the dtypes of the factors and autocast say."""
    with torch.autocast(lora_a.device.type, enabled=False):
        return (lora_b.float() @ lora_a.float()) * scaling


def merged_weight(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The weight [N, K] with its adapter merged: added in float32 and rounded once to the weight's dtype."""
    return (weight.float() + low_rank_delta(lora_a, lora_b, scaling)).to(weight.dtype)


class _FakeQuantizedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        merged = _merged_values(weight, lora_a, lora_b, options)
        bias = None if bias is None else bias.to(options.dtype)
        return torch.nn.functional.linear(_input_values(x, options), merged, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,), options = grads, ctx.options
        x, weight, lora_a, lora_b = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad_output @ _merged_values(weight, lora_a, lora_b, options)).to(x.dtype)
            if options.activation is not None:
                grad_input = options.activation.pass_gradient(grad_input, x)
        rows = grad_output.flatten(0, -2)
        needs_rows = any(ctx.needs_input_grad[position] for position in (1, 3, 4))
        x_rows = _input_values(x, options).flatten(0, -2) if needs_rows else rows
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x_rows).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            narrow = rows @ lora_b.to(options.dtype)  # [M, r]
            grad_a = (narrow.t() @ x_rows).to(lora_a.dtype) * options.scaling
        if ctx.needs_input_grad[4]:
            narrow = x_rows @ lora_a.to(options.dtype).t()  # [M, r]
            grad_b = (rows.t() @ narrow).to(lora_b.dtype) * options.scaling
        return grad_input, grad_weight, grad_bias, grad_a, grad_b, None


def fake_quantized_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    activation: FakeQuantizer | None,
    weight_quantizer: FakeQuantizer | None,
) -> torch.Tensor:
    """`fq(x)[..., K] @ fq(weight + scaling * lora_b @ lora_a)[N, K].T + bias`, with straight-through gradients.

    Products are in x's dtype, under autocast in autocast's; quantization is of the tensors as they come.

    Args:
        x: [..., K].
        weight: [N, K], usually frozen.
        bias: [N], or None.
        lora_a: [r, K], any floating dtype.
        lora_b: [N, r].
        scaling: of the adapter, alpha / r.
        activation: quantizer of x, or None.
        weight_quantizer: quantizer of the merged weight, or None.

    Raises:
        ValueError: factors that do not fit the weight.
    """
    n, k = weight.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(
            f"fake_quantized_lora got lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; want [r, {k}] and "
            f"[{n}, r] for a weight of shape {(n, k)}."
        )
    if x.dim() == 1:
        row = fake_quantized_lora(x[None], weight, bias, lora_a, lora_b, scaling, activation, weight_quantizer)
        return row.squeeze(0)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    options = _Options(scaling, activation, weight_quantizer, dtype)
    with torch.autocast(device, enabled=False):
        return _FakeQuantizedLora.apply(x, weight, bias, lora_a, lora_b, options)


def _input_values(x: torch.Tensor, options: _Options) -> torch.Tensor:
    return (x if options.activation is None else options.activation.values(x)).to(options.dtype)


def _merged_values(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, options: _Options) -> torch.Tensor:
    merged = merged_weight(weight, lora_a, lora_b, options.scaling)
    return (merged if options.weight_quantizer is None else options.weight_quantizer.values(merged)).to(options.dtype)
