"""torch's own products of quantized codes, for layers that may round otherwise than training did.

    int8    codes of int8 inputs and weights multiplied as integers, `torch._int_mm`; exact but for the scaling
    w8      inputs times int8 weights, `torch.ops.aten._weight_int8pack_mm`, CPU, few rows
    w4      inputs times 4-bit weights in groups, `torch.ops.aten._weight_int4pack_mm_for_cpu`, CPU, few rows

A layer that is `fast` calls the one that applies, and else multiplies by its dequantized weight as every layer does:
when a gradient is wanted, while a graph is traced (a compiler fuses the decoding), and where a product is slower.
`w8` and `w4` take scales in the dtype of the input. docs/quantization.md has times.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain
from aotrain.quantization.schemes import AffineScheme, TensorScheme

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
    weight, activation = _format(layer.scheme.weight), _format(layer.scheme.activation)
    if weight is None:
        return None
    rows = x.numel() // x.shape[-1]
    if activation is not None:
        return _int8_product if _is_int8(weight) and _is_int8(activation) and _int_mm_takes(layer, rows) else None
    if layer.scheme.activation is not None or x.device.type != "cpu" or rows > _FEW_ROWS:
        return None
    if _is_int8(weight):
        return _weight_int8_product
    return _weight_int4_product if _is_int4(weight) else None


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


def _int_mm_takes(layer: "QuantizedLinear", rows: int) -> bool:
    # Constraints of cuBLAS, as torch states them.
    return not layer.codes.is_cuda or (rows > 16 and layer.in_features % 8 == 0 and layer.out_features % 8 == 0)


def _int8_product(layer: "QuantizedLinear", x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert layer.scheme.activation is not None
    encoded = layer.scheme.activation.encode(x)
    sums = torch._int_mm(encoded.data.flatten(0, -2), layer.codes.t()).float()
    values = sums * encoded.scale.reshape(-1, 1).float() * layer.scale.flatten().float()
    return _finish(values.to(x.dtype), x, bias)


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
