"""All-to-all of routed tokens with low-precision payload: dispatch to the experts, combine back, and their gradients.

A payload is a `Scaling` whose scales belong to one row each, MXFP8 (1 x 32) or float8 rowwise, or None for the dtype of
the tensor. Codes and scales of a row travel beside each other (`packed_rows`), so each direction is one collective.

| collective          | default        | why                                                                          |
|---------------------|----------------|------------------------------------------------------------------------------|
| dispatch            | MXFP8          | the grouped product quantizes these rows 1 x 32 anyway: nothing is lost      |
| gradient of it      | high precision | a sum over the experts of a token follows                                    |
| combine             | high precision | a sum over the experts of a token follows                                    |
| gradient of it      | MXFP8          | the grouped product for grad_input quantizes these rows 1 x 32 anyway        |

"Nothing is lost": quantizing the dequantized rows again gives the same values, also where the scale comes out smaller
(docs/numerics.md, "Expert parallelism"). What is sent in low precision has a straight-through gradient.

A quantized dispatch can hand out codes (`all_to_all_dispatch_quantized`) or values (`all_to_all_dispatch`). Codes have
no gradient of their own dtype, so a `QuantizedRows` carries a handle beside them, through which gradients pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT8_E4M3,
    ROWWISE,
    SCALE_FORMATS,
    ScaledTensor,
    Scaling,
    dequantize,
    quantize,
)
from aotrain.kernels import RowPermutation, gather_rows, scaled_cast, sum_rows
from aotrain.ops.packed_rows import pack_rows, packed_width, unpack_rows
from aotrain.ops.token_order import TokenOrder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | str | None
    # output splits, input splits, group
    _Where = tuple[tuple[int, ...], tuple[int, ...], Group]

MXFP8_ROWS = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
FLOAT8_ROWS = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32_pow2"], block=ROWWISE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What each of the four collectives of a mixture-of-experts layer carries; None for high precision."""

    # Tokens on their way to the experts, forward.
    dispatch: Scaling | None = MXFP8_ROWS
    # Their gradients on the way back.
    dispatch_grad: Scaling | None = None
    # Outputs of the experts on their way back, forward.
    combine: Scaling | None = None
    # Their gradients on the way to the experts.
    combine_grad: Scaling | None = MXFP8_ROWS

    def __post_init__(self) -> None:
        for scaling in (self.dispatch, self.dispatch_grad, self.combine, self.combine_grad):
            if scaling is not None:
                packed_width(0, scaling)  # raises for what cannot be sent by rows


PAYLOADS: dict[str, Payload] = {
    "high_precision": Payload(dispatch=None, combine_grad=None),
    "mxfp8": Payload(),
    "float8_rowwise": Payload(dispatch=FLOAT8_ROWS, combine_grad=FLOAT8_ROWS),
}


class QuantizedRows(NamedTuple):
    """Rows that are here as codes, and a tensor that stands for them in autograd.

    Attributes:
        q: data [rows, K] and their scales; neither requires gradients.
        handle: [rows, K] of the dtype that the rows had, without storage of its own and with NaN for values. Whoever
            consumes the codes returns their gradient as the gradient of the handle.
    """

    q: ScaledTensor
    handle: torch.Tensor


def all_to_all_dispatch(
    x: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: "Group" = None,
    *,
    forward: Scaling | None = MXFP8_ROWS,
    backward: Scaling | None = None,
    order: TokenOrder | None = None,
) -> torch.Tensor:
    """Send rows to the ranks of their experts. Differentiable in x; the gradient travels with the splits exchanged.

    Args:
        x: [rows, K], float32, bfloat16 or float16; sum(input_splits) rows in the order of the ranks they go to. With an
            order: tokens.
        output_splits: rows that come from each rank of the group.
        input_splits: rows that go to each rank of the group.
        group: a process group, one-dimensional mesh or group name; None for the default group.
        forward: payload of the rows; None for x's dtype.
        backward: payload of the gradients; None for their dtype.
        order: send the rows `expand_rows(x, order)`, of which a token has several. Each token is quantized once, and
            with a payload the rows of x's dtype are never made.

    Returns:
        [sum(output_splits), K] in x's dtype: with a payload, what dequantizing the sender's codes gives, bit for bit.

    Raises:
        ValueError: x is not a matrix, splits do not fit it, or a payload whose scales are not of one row each.
    """
    where = (tuple(output_splits), tuple(input_splits), group)
    if forward is not None:
        sent = all_to_all_dispatch_quantized(x, *where, forward=forward, backward=backward, order=order)
        return dequantize_rows(sent)
    _check_splits(x, input_splits, order)
    return cast(torch.Tensor, _Send.apply(x, *(order or (None, None)), where, backward))


def all_to_all_combine(
    x: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: "Group" = None,
    *,
    forward: Scaling | None = None,
    backward: Scaling | None = MXFP8_ROWS,
) -> torch.Tensor:
    """Send outputs of the experts back: `all_to_all_dispatch` with the other defaults.

    The splits are those of this direction: what dispatch had as output_splits is here input_splits.
    """
    return all_to_all_dispatch(x, output_splits, input_splits, group, forward=forward, backward=backward)


def all_to_all_dispatch_quantized(
    x: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: "Group" = None,
    *,
    forward: Scaling = MXFP8_ROWS,
    backward: Scaling | None = None,
    order: TokenOrder | None = None,
) -> QuantizedRows:
    """`all_to_all_dispatch` that hands out the codes, for a product that takes its left operand quantized this way.

    The data are a view of the buffer that was received; `permute_quantized` makes them contiguous.
    """
    _check_splits(x, input_splits, order)
    where = (tuple(output_splits), tuple(input_splits), group)
    handle, data, scale = cast(
        tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        _SendQuantized.apply(x, *(order or (None, None)), where, forward, backward),
    )
    return QuantizedRows(ScaledTensor(data, scale, forward), handle)


def dequantize_rows(rows: QuantizedRows) -> torch.Tensor:
    """The values of quantized rows in the handle's dtype; their gradient is the handle's."""
    return cast(torch.Tensor, _DequantizeRows.apply(rows.handle, rows.q.data, rows.q.scale, rows.q.scaling))


def permute_quantized(rows: QuantizedRows, permutation: RowPermutation) -> QuantizedRows:
    """Quantized rows at their places after the permutation; padding has the codes and the scale of a row of zeros."""
    q = rows.q
    data, scale = gather_rows(q.data, permutation.indices), gather_rows(q.scale, permutation.indices)
    if q.scaling.scale.e8m0_rounding is None:  # zero bits are the scale of zeros in E8M0 only
        zero = quantize(rows.handle.new_zeros(1, q.data.shape[1], dtype=torch.float32), q.scaling).scale
        scale = torch.where((permutation.indices < 0).unsqueeze(1), zero, scale)
    return QuantizedRows(ScaledTensor(data, scale, q.scaling), _permute_handle(rows.handle, permutation))


def exchange_rows(
    x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: "Group" = None
) -> torch.Tensor:
    """The collective itself: rows of any dtype, without a gradient. Waits for them."""
    # Here, because it takes as long to import as half of this package.
    from torch.distributed import _functional_collectives as collectives

    where = cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)
    received = collectives.all_to_all_single(x.contiguous(), list(output_splits), list(input_splits), where)
    return collectives.wait_tensor(received)


def _check_splits(x: torch.Tensor, input_splits: Sequence[int], order: TokenOrder | None) -> None:
    rows = sum(input_splits)
    if x.dim() != 2 or (x.shape[0] if order is None else order.tokens.shape[0]) != rows:
        raise ValueError(
            f"all-to-all got x of shape {tuple(x.shape)} for input_splits {list(input_splits)}; want a matrix of "
            f"{rows} rows, or tokens and an order of {rows} rows."
        )


def _exchange_quantized(
    x: torch.Tensor, tokens: torch.Tensor | None, scaling: Scaling, where: "_Where"
) -> ScaledTensor:
    """Quantize, send codes and scales in one collective, and unpack what came."""
    packed_width(x.shape[1], scaling)  # raises before any rank waits
    packed = pack_rows(scaled_cast(x, scaling))
    if tokens is not None:
        packed = gather_rows(packed, tokens)
    return unpack_rows(exchange_rows(packed, *where), x.shape[1], scaling)


class _Send(torch.autograd.Function):
    """High precision forward, any payload backward. Saves the slots of an order, 4 bytes per row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        slots: torch.Tensor | None,
        where: "_Where",
        backward: Scaling | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.where, ctx.payload = where, backward
        return exchange_rows(x if tokens is None else gather_rows(x, tokens), *where)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _send_gradient(ctx, grad_outputs[0]), None, None, None, None


class _SendQuantized(torch.autograd.Function):
    """Quantized forward, any payload backward: (handle, data, scale). Saves the slots of an order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        slots: torch.Tensor | None,
        where: "_Where",
        forward: Scaling,
        backward: Scaling | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(slots)
        ctx.where, ctx.payload = where, backward
        q = _exchange_quantized(x, tokens, forward, where)
        ctx.mark_non_differentiable(q.data, q.scale)
        return x.new_full((), torch.nan).expand(q.data.shape), q.data, q.scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _send_gradient(ctx, grad_outputs[0]), None, None, None, None, None


def _send_gradient(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """The gradient on its way back, in the payload of backward and the dtype it came in; one row per token."""
    output_splits, input_splits, group = ctx.where
    where = (input_splits, output_splits, group)
    if ctx.payload is None:
        rows = exchange_rows(grad, *where)
    else:
        rows = dequantize(_exchange_quantized(grad, None, ctx.payload, where), grad.dtype)
    (slots,) = ctx.saved_tensors
    return rows if slots is None else sum_rows(rows, slots)


class _DequantizeRows(torch.autograd.Function):
    """Straight through to the handle. Saves nothing."""

    @staticmethod
    def forward(
        ctx: Any, handle: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, scaling: Scaling
    ) -> torch.Tensor:
        return dequantize(ScaledTensor(data, scale, scaling), handle.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad_outputs[0], None, None, None


class _PermuteHandle(torch.autograd.Function):
    """No values move forward, gradients do backward. Saves the index list of backward."""

    @staticmethod
    def forward(ctx: Any, handle: torch.Tensor, indices: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return handle.new_full((), torch.nan).expand(indices.shape[0], handle.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_rows(grad_outputs[0], ctx.saved_tensors[0]), None, None


def _permute_handle(handle: torch.Tensor, permutation: RowPermutation) -> torch.Tensor:
    return cast(torch.Tensor, _PermuteHandle.apply(handle, permutation.indices, permutation.inverse))
