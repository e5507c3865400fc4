"""LoRA on a fake-quantized layer: training sees the grid of W + scale * B A, the weight that is served.

    config = LoraConfig(r=16, target_modules="all-linear")
    quantize_what_is_served(config)
    model = get_peft_model(model, config)     # after prepare_qat(model, scheme)

Fake-quantizing the frozen W alone, as others do it, trains for a grid that merging leaves. With the straight-through
estimator, y = x Q(W + s B A)^T has the gradients

    dx = dy Q(W + s B A)      dA = s (B^T dy^T) x      dB = s dy^T (x A^T)

so the adapters cost what they cost in plain LoRA: no gradient of the size of W is formed. Not taken into account in dA
and dB are saturated weights, which scales by the maximum hardly have, and the rounding of quantized activations. The
merged weight is made again in every forward, and held until backward.

DoRA, dropout, biases of adapters and several active adapters are not expressed by that weight, and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear


def quantize_what_is_served(config: LoraConfig) -> LoraConfig:
    """Have peft wrap linear layers by `QATLoraLinear`; returns the same config.

    Raises:
        ValueError: DoRA, dropout or a bias of adapters.
    """
    for name, given in (
        ("use_dora", config.use_dora),
        ("lora_dropout", config.lora_dropout),
        ("lora_bias", config.lora_bias),
    ):
        if given:
            raise ValueError(
                f"QAT with LoRA got {name}={given}; training sees W + scale * B A, the weight that is served, which "
                f"has no place for it: leave {name} out."
            )
    config._register_custom_module({torch.nn.Linear: QATLoraLinear})
    return config


class QATLoraLinear(Linear):
    """peft's LoRA layer around a fake-quantized linear layer; see the module."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add the one adapter.

        Raises:
            ValueError: a second adapter.
        """
        others = [name for name in self.lora_A if name != adapter_name]
        if others:
            raise ValueError(
                f"QAT with LoRA got a second adapter {adapter_name!r} beside {others[0]!r}; a fake-quantized layer "
                "serves one weight: merge the first adapter, or delete it."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N], with the fake-quantized merged weight; without adapters that of the base layer."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        (adapter,) = active
        base: Any = self.get_base_layer()
        # As peft merges, outside of autocast, so that these are the bits of the merged checkpoint.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = base.weight.clone()
            weight += self.get_delta_weight(adapter)
        output = torch.func.functional_call(base, {"weight": weight}, (x,))
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return _AdapterGradient.apply(output, x, a, b, self.scaling[adapter])


class _AdapterGradient(torch.autograd.Function):
    """Passes the output through and gives the adapters the gradient of x (s B A)^T. Saves x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling = scaling
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grads
        x, a, b = ctx.saved_tensors
        # [tokens, N] and [tokens, K], in the dtype that the product of the layer had.
        rows, inputs = grad_output.flatten(0, -2), x.flatten(0, -2).to(grad_output.dtype)
        grad_a = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_a = ((rows @ b.to(rows.dtype)).t() @ inputs * ctx.scaling).to(a.dtype)  # [r, K]
        if ctx.needs_input_grad[3]:
            grad_b = (rows.t() @ (inputs @ a.to(rows.dtype).t()) * ctx.scaling).to(b.dtype)  # [N, r]
        return grad_output, None, grad_a, grad_b, None
