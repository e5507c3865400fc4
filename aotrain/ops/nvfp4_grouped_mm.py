"""nvfp4_grouped_mm: the linear layers of all experts at once, with forward and backward products in NVFP4.

With x [M, K] sorted by expert, and x[e] the rows of expert e, values and gradients of expert e are those of
`nvfp4_linear(x[e], weight[e].T, bias[e])` with the same recipe, signs and seed, bit for bit where products are
emulated. That settles every scale and all noise:

- activations and gradients have a global scale per expert, of its own rows; weights one per expert;
- the noise of an expert's gradient follows from the seed and from that gradient (`formats.data_key`), not from the
  expert's number, from other experts' rows, or from where its rows lie. An expert that is computed by another rank, or
  beside others, has the same bits. Experts with equal gradients have equal noise.

Kept for backward: x and the weight as they came, and nothing of one whose partner needs no gradient.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, whose models are dense.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch

from aotrain.formats import BLOCKWISE_1X16, BLOCKWISE_16X16
from aotrain.kernels.groups import GroupLayout, group_layout
from aotrain.kernels.nvfp4_cast import ALIGNMENT
from aotrain.kernels.nvfp4_grouped_cast import nvfp4_batched_cast, nvfp4_grouped_cast
from aotrain.kernels.nvfp4_grouped_mm import nvfp4_grouped_mm as grouped_product
from aotrain.kernels.nvfp4_grouped_mm import nvfp4_grouped_mm_contracted
from aotrain.kernels.scaled_grouped_mm import grouped_mm_contracted
from aotrain.ops.grouped_operands import bias_gradient, bias_of_rows, check_grouped
from aotrain.ops.nvfp4_linear import DEFAULT_SIGNS, NVFP4_RECIPE, Nvfp4Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4Method:
    """What `scaled_grouped_mm` takes in the place of a `LinearRecipe` to compute in NVFP4.

    Attributes:
        recipe: which parts of the method apply.
        signs: 16 of 1 and -1, of the Hadamard transform; the same ones throughout a training.
        seed: of the noise of stochastic rounding. Layers may share it.
    """

    recipe: Nvfp4Recipe = NVFP4_RECIPE
    signs: tuple[int, ...] = DEFAULT_SIGNS
    seed: int = 0

    @property
    def used_signs(self) -> tuple[int, ...]:
        """Of the transform, if there is one."""
        return self.signs if self.recipe.hadamard else ()

    @property
    def grad_seed(self) -> int | None:
        """None rounds to nearest."""
        return self.seed if self.recipe.stochastic_rounding else None

    @property
    def weight_block(self) -> tuple[int, int]:
        """Elements of a weight that share a scale."""
        return BLOCKWISE_16X16 if self.recipe.square_weight_blocks else BLOCKWISE_1X16

    def __str__(self) -> str:
        return "nvfp4"


def nvfp4_grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    method: Nvfp4Method | None = None,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row of x times the matrix of its group, in NVFP4. Differentiable in x, weight and bias.

    Inside an autocast region x is first cast to the autocast dtype. Products are emulated on every device so far.

    Args:
        x: [M, K], float32, bfloat16 or float16, rows sorted by group.
        weight: [E, K, N], any of these dtypes and any strides.
        offsets: int32 [E] on x's device: the row after the last of each group, in order, the last one at most M.
        method: default the paper's.
        bias: None, [N], or [E, N] for one per group; added in the output's dtype.

    Returns:
        [M, N] in x's dtype (the autocast dtype where that applies). Rows past the last group are zero, as is their
        gradient, whatever x and the gradient of the output hold there.

    Raises:
        ValueError: shapes or devices that do not go together; on CPU also offsets out of order or beyond M. For those
            on a GPU see `scaled_grouped_mm`.
        TypeError: offsets that are not int32.
    """
    check_grouped(x, weight, offsets, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    layout = group_layout(offsets, x.shape[0], ALIGNMENT)
    method = Nvfp4Method() if method is None else method
    return cast(torch.Tensor, _Nvfp4GroupedMM.apply(x, weight, bias, *layout[:2], method))


class _Nvfp4GroupedMM(torch.autograd.Function):
    """The three products of all groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ends: torch.Tensor,
        padded_ends: torch.Tensor,
        method: Nvfp4Method,
    ) -> torch.Tensor:
        layout = GroupLayout(ends, padded_ends, x.shape[0], ALIGNMENT)
        x_q, _ = nvfp4_grouped_cast(x, layout)
        assert x_q is not None
        y = grouped_product(x_q, nvfp4_batched_cast(weight.mT, method.weight_block), layout, x.dtype)
        if bias is not None:
            y = y + bias_of_rows(bias.to(y.dtype), layout)  # not in place, as in `scaled_grouped_mm`
        ctx.save_for_backward(
            *(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None),
            *(ends, padded_ends),
        )
        ctx.method, ctx.dtypes = method, (x.dtype, weight.dtype)
        ctx.bias = None if bias is None else (bias.dim() == 2, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        method: Nvfp4Method = ctx.method
        x, weight, ends, padded_ends = ctx.saved_tensors
        layout = GroupLayout(ends, padded_ends, grad.shape[0], ALIGNMENT)
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_q, grad_t = nvfp4_grouped_cast(
            grad,
            layout,
            as_is=needs_input,
            transposed=needs_weight and method.recipe.quantize_grad_weight,
            signs=method.used_signs,
            seed=method.grad_seed,
        )
        grad_input = grad_weight = grad_bias = None
        if grad_q is not None:
            w_t = nvfp4_batched_cast(weight, method.weight_block)
            grad_input = grouped_product(grad_q, w_t, layout, ctx.dtypes[0])
        if grad_t is not None:
            _, x_t = nvfp4_grouped_cast(x, layout, as_is=False, transposed=True, signs=method.used_signs)
            assert x_t is not None
            grad_weight = nvfp4_grouped_mm_contracted(grad_t, x_t, layout, ctx.dtypes[1]).mT
        elif needs_weight:
            grad_weight = grouped_mm_contracted(grad, x.to(grad.dtype), layout).to(ctx.dtypes[1]).mT
        if needs_bias:
            grad_bias = bias_gradient(grad, ends, *ctx.bias)
        return grad_input, grad_weight, grad_bias, None, None, None
