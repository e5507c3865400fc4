"""Products of quantized codes, for layers that may round otherwise than training did.

    both    codes of inputs times codes of weights, `kernels.scaled_mm`: int8 (`torch._int_mm`), float8 per tensor, row
            or 128 x 128 (`torch._scaled_mm` where the GPU has it) and MX; summed in float32 or int32, then scaled
    w8      inputs times int8 weights, `torch.ops.aten._weight_int8pack_mm`, CPU, few rows
    w4      inputs times 4-bit weights in groups, `torch.ops.aten._weight_int4pack_mm_for_cpu`, CPU, few rows

A layer that is `fast` calls the one that applies, and else multiplies by its dequantized weight as every layer does:
when a gradient is wanted, while a graph is traced (a compiler fuses the decoding), and where a product is slower or the
GPU does not have it. `w8` and `w4` take scales in the dtype of the input.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    TENSORWISE,
    AffineFormat,
    MappingType,
    ScaledTensor,
    Scaling,
    ZeroPointDomain,
    is_mx,
)
from aotrain.kernels import mx_mm_problem, native_scaled_mm_problem, scaled_mm
from aotrain.quantization.schemes import AffineScheme, Encoded, FlatScheme, ScaledScheme, Scheme, TensorScheme

if TYPE_CHECKING:
    from aotrain.quantization.modules import QuantizedLinear

# Called as (layer, x, bias), x in the dtype of the product.
Product = Callable[["QuantizedLinear", torch.Tensor, torch.Tensor | None], torch.Tensor]

# With more rows the dequantized product is as fast: 64 rows of 1024 took 16 ms with either on one Zen 5 core.
_FEW_ROWS = 32
_INT4_GROUPS = (32, 64, 128, 256)
_PACKED = "_int4_packed"


def fast_products(model: torch.nn.Module, enabled: bool = True) -> int:
    """Let quantized linear layers call products of codes, or stop them; returns their number."""
    from aotrain.quantization.modules import QuantizedLinear

    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.fast = enabled
    return len(layers)


def find_product(layer: "QuantizedLinear", x: torch.Tensor, dtype: torch.dtype) -> Product | None:
    """The product of codes for this layer and input; None: multiply by the dequantized weight."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad) or x.numel() == 0:
        return None
    if layer.scheme.activation is not None:
        return _product_of_codes if _has_product_of_codes(layer.scheme, x.device, dtype) else None
    weight = _format(layer.scheme.weight)
    if weight is None or x.device.type != "cpu" or x.numel() // x.shape[-1] > _FEW_ROWS:
        return None
    if _is_int8(weight):
        return _weight_int8_product
    return _weight_int4_product if _is_int4(weight) else None


def _has_product_of_codes(scheme: Scheme, device: torch.device, dtype: torch.dtype) -> bool:
    a, b = _scaling(scheme.activation), _scaling(scheme.weight)
    if a is None or b is None or is_mx(a) != is_mx(b):
        return False
    if is_mx(a):
        return mx_mm_problem(device, a.element.name, b.element.name, dtype) is None
    if a.element is INT8 or b.element is INT8:
        return a.element is b.element
    if FLOAT8_E4M3 not in (a.element, b.element) or not {a.element, b.element} <= {FLOAT8_E4M3, FLOAT8_E5M2}:
        return False
    rows = (ROWWISE, TENSORWISE)
    if (a.block, b.block) != (BLOCKWISE_1X128, BLOCKWISE_128X128) and not (a.block in rows and b.block in rows):
        return False
    return native_scaled_mm_problem(device, a.block) is None


def _scaling(scheme: TensorScheme | None) -> Scaling | None:
    """The scheme as an operand of `scaled_mm`; None if it is none."""
    if isinstance(scheme, FlatScheme) and not scheme.one_row:
        scheme = scheme.inner
    if isinstance(scheme, ScaledScheme):
        return scheme.scaling
    fmt = _format(scheme)
    return Scaling(element=INT8, block=ROWWISE) if fmt is not None and _is_int8(fmt) else None


def _format(scheme: TensorScheme | None) -> AffineFormat | None:
    return scheme.format if isinstance(scheme, AffineScheme) else None


def _is_int8(fmt: AffineFormat) -> bool:
    """Symmetric, a scale per row."""
    same = fmt.mapping is not MappingType.ASYMMETRIC and fmt.domain is ZeroPointDomain.INT
    return same and fmt.group_size is None and (fmt.quant_min, fmt.quant_max) == (-128, 127)


def _is_int4(fmt: AffineFormat) -> bool:
    if fmt.quant_max - fmt.quant_min != 15 or fmt.group_size not in _INT4_GROUPS:
        return False
    return fmt.domain is ZeroPointDomain.FLOAT or not fmt.has_zero_point


def _product_of_codes(layer: "QuantizedLinear", x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    activation, weight = layer.scheme.activation, layer.scheme.weight
    assert activation is not None
    a = _operand(activation, activation.encode(x.flatten(0, -2)))
    return _finish(scaled_mm(a, _operand(weight, layer.encoded()), x.dtype), x, bias)


def _operand(scheme: TensorScheme, encoded: Encoded) -> ScaledTensor:
    scaling = _scaling(scheme)
    assert scaling is not None
    # Scales of int8 codes are in the dtype of the weight.
    scale = encoded.scale if encoded.scale.element_size() == 1 else encoded.scale.float()
    return ScaledTensor(encoded.data, scale, scaling)


def _weight_int8_product(layer: "QuantizedLinear", x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, scale = x.flatten(0, -2).contiguous(), layer.scale.flatten().to(x.dtype)
    return _finish(torch.ops.aten._weight_int8pack_mm(rows, layer.codes, scale), x, bias)


def _weight_int4_product(layer: "QuantizedLinear", x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    fmt = _format(layer.scheme.weight)
    assert fmt is not None
    packed, scales = _int4_operands(layer, x.dtype)
    rows = x.flatten(0, -2).contiguous()
    return _finish(torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, fmt.group_size, scales), x, bias)


def _finish(values: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    values = values.reshape(*x.shape[:-1], values.shape[-1])
    return values if bias is None else values + bias


def _int4_operands(layer: "QuantizedLinear", dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the layout of this CPU's kernel, and [K / group, N, 2] of scales and zero points in a dtype; made once.

    Kept outside of the state: the layout is that of the machine. Made again when a buffer was replaced or written.
    """
    buffers = (layer.codes, layer.scale, layer.zero_point)
    versions = (dtype, *(None if buffer is None else buffer._version for buffer in buffers))
    cached = layer.__dict__.get(_PACKED)
    if cached is not None:
        same = all(one is other for one, other in zip(cached[0], buffers, strict=True))
        if same and cached[1] == versions:
            return cached[2], cached[3]
    encoded = layer.encoded()
    codes = encoded.data.to(torch.int32) - layer.scheme.weight.code_range[0]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zero_point = torch.zeros_like(encoded.scale) if encoded.zero_point is None else encoded.zero_point
    scales = torch.stack([encoded.scale, zero_point], dim=-1).transpose(0, 1).to(dtype).contiguous()
    layer.__dict__[_PACKED] = (buffers, versions, packed, scales)
    return packed, scales
