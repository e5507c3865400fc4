"""compressed-tensors: the format of vLLM and SGLang, which transformers reads too. The default.

A quantized layer `m` has, in place of `m.weight`, by its scheme (out = rows, in = columns):

| scheme | `format` | tensors |
|---|---|---|
| int2, int4, int8 in groups | pack-quantized | `weight_packed` int32, `weight_scale` per group, `weight_shape` |
| int8 per channel | int-quantized | `weight` int8, `weight_scale` [out, 1] |
| float8 per channel, per block | float-quantized | `weight` e4m3, `weight_scale` float32 [out, 1] or per 128 x 128 |
| nvfp4 | nvfp4-pack-quantized | `weight_packed` uint8 [out, in / 2], `weight_scale` e4m3, `weight_global_scale` |
| mxfp4 | mxfp4-pack-quantized | `weight_packed` uint8 [out, in / 2], `weight_scale` uint8 exponents |
| mxfp8 | mxfp8-quantized | `weight` e4m3, `weight_scale` uint8 exponents |

Packed integers are `code + 2^(bits - 1)`, the first in the lowest bits of a word, along a row; a row ends with a whole
word. Symmetric weights have no zero point: readers refuse one. `weight_global_scale` **divides**, against the
convention of everything else here. Linear layers that stay dense are named in `ignore`.

Source: the layouts of compressed-tensors 0.20 and of vLLM's readers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from aotrain.export.base import ExportFormat, Layer, Plan, Reader
from aotrain.export.parts import rows_of
from aotrain.export.selection import is_expert
from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    ROWWISE,
    pack_float4,
)
from aotrain.quantization.schemes import AffineScheme, Encoded, Nvfp4Scheme, ScaledScheme, Scheme, TensorScheme

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
_PACKED_BITS = (2, 4, 8)
# What transformers 5.23 does with the experts of a mixture in these layouts.
_EXPERTS = {
    INTEGER: "fails to load experts with one int8 scale per channel",
    MXFP8: "fails to load experts in mxfp8",
    NVFP4: "loads experts in nvfp4 without their global scales, which makes them thousands of times too large",
}


class CompressedTensors(ExportFormat):
    """Layouts of this module's docstring."""

    name = "compressed-tensors"

    def refusal(self, scheme: Scheme) -> str | None:
        weight, activation = scheme.weight, scheme.activation
        if isinstance(weight, AffineScheme):
            problem = _integer_problem(weight)
        elif weight_layout(scheme) is None:
            problem = f"compressed-tensors has no layout for {weight}"
        else:
            problem = None
        if problem is None and activation is not None and _activation_arguments(activation) is None:
            return (
                f"compressed-tensors describes symmetric activations only, this scheme has {activation}: int4-g32-a8 "
                "is the symmetric one, or use format torchao"
            )
        return problem

    def refusal_of_embeddings(self, scheme: Scheme) -> str | None:
        return (
            "transformers 5.23 loads packed embeddings and then finds no weight in them, and vLLM 0.32 reads them on "
            "GPUs only, which was not tried"
        )

    def server_view(self, scheme: Scheme) -> str:
        weights = _weight_arguments(scheme.weight)
        kind = {"int": "int", "float": "fp"}[weights["type"]]
        inputs = None if scheme.activation is None else _activation_arguments(scheme.activation)
        taken = "W" + str(weights["num_bits"]) + "A" + ("16" if inputs is None else str(inputs["num_bits"]))
        layer = f"{kind}{weights['num_bits']} {_strategy(weights)} weights"
        layer += "" if inputs is None else f", {kind}{inputs['num_bits']} {_strategy(inputs)} activations"
        reader = _vllm_class(scheme)
        return f"compressed-tensors {weight_layout(scheme)} {taken}, {layer}; vLLM: {reader or 'no scheme for it'}"

    def refusal_of_plan(self, plan: Plan) -> str | None:
        wrong = _EXPERTS.get(weight_layout(plan.scheme) or "")
        if wrong is None or not any(map(is_expert, plan.layers)):
            return None
        return f"transformers {wrong}: choose int4-g32, int8-g32, fp8 or mxfp4, or exclude '*.experts.*'"

    def pack(self, layer: Layer, scheme: Scheme, encoded: Encoded) -> dict[str, torch.Tensor]:
        data, scale, name = encoded.data, encoded.scale, layer.name
        layout = weight_layout(scheme)
        if layout == PACKED:
            assert isinstance(scheme.weight, AffineScheme)
            return {
                f"{name}.weight_packed": pack_integers(data, integer_bits(scheme.weight)),
                f"{name}.weight_scale": scale,
            }
        if layout in (MXFP4, MXFP8):
            scale = scale.view(torch.uint8)
        if layout in (NVFP4, MXFP4):
            return {f"{name}.weight_packed": pack_float4(data), f"{name}.weight_scale": scale}
        return {f"{name}.weight": data, f"{name}.weight_scale": scale}

    def constants(self, layer: Layer, scheme: Scheme, global_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
        layout = weight_layout(scheme)
        if layout == PACKED:
            return {f"{layer.name}.weight_shape": torch.tensor(layer.shape, dtype=torch.int64)}
        if layout == NVFP4:
            assert global_scale is not None
            return {f"{layer.name}.weight_global_scale": global_scale.reshape(1).reciprocal()}
        return {}

    def decode(self, layer: Layer, scheme: Scheme, read: Reader, part: slice) -> torch.Tensor:
        layout, name = weight_layout(scheme), layer.name
        scale, global_scale = rows_of(read(f"{name}.weight_scale"), layer.shape[0], part), None
        if layout == PACKED:
            assert isinstance(scheme.weight, AffineScheme)
            rows, columns = read(f"{name}.weight_shape")[:].tolist()
            words = read(f"{name}.weight_packed")
            assert words.shape[0] == rows
            data = _integers_from_bytes(words[part], integer_bits(scheme.weight))[:, :columns]
        elif layout in (NVFP4, MXFP4):
            data = codes_from_nibbles(read(f"{name}.weight_packed")[part])
        else:
            data = read(f"{name}.weight")[part]
        if layout == NVFP4:
            global_scale = (1 / read(f"{name}.weight_global_scale")[:].double()).float().reshape(1, 1)
        elif layout in (MXFP4, MXFP8):
            scale = scale.view(torch.float8_e8m0fnu)
        return scheme.weight.decode(Encoded(data, scale, global_scale=global_scale), layer.dtype)

    def update_config(self, config: dict[str, Any], plan: Plan) -> None:
        layout = weight_layout(plan.scheme)
        activation = plan.scheme.activation
        group = {
            "targets": ["Linear"],
            "weights": _weight_arguments(plan.scheme.weight),
            "input_activations": None if activation is None else _activation_arguments(activation),
            "output_activations": None,
            "format": layout,
        }
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": list(plan.ignored),
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
        }


def _strategy(arguments: Mapping[str, Any]) -> str:
    """The strategy of weights or activations, with the size of a group."""
    strategy, size = arguments["strategy"], arguments["group_size"]
    return strategy if size is None else f"{strategy} {size}"


def _vllm_class(scheme: Scheme) -> str | None:
    """Class of vLLM 0.32 that takes a scheme; None if none does."""
    layout, inputs = weight_layout(scheme), scheme.activation
    if layout == PACKED:
        if inputs is None:
            return "CompressedTensorsWNA16"
        assert isinstance(inputs, AffineScheme)
        return f"CompressedTensorsWNA{integer_bits(inputs)}Int"
    if layout == INTEGER:
        return None if inputs is None else "CompressedTensorsW8A8Int8"
    if layout == FLOAT:
        return "CompressedTensorsW8A16Fp8" if inputs is None else "CompressedTensorsW8A8Fp8"
    return {
        NVFP4: "CompressedTensorsW4A4Fp4, without quantized activations",
        MXFP4: "CompressedTensorsW4A4Mxfp4",
        MXFP8: "CompressedTensorsW8A8Mxfp8",
    }.get(layout or "")


def weight_layout(scheme: Scheme) -> str | None:
    """The `format` that carries a scheme's weights; None if none does."""
    weight = scheme.weight
    if isinstance(weight, AffineScheme):
        return INTEGER if integer_bits(weight) == 8 and weight.format.group_size is None else PACKED
    if isinstance(weight, Nvfp4Scheme):
        return NVFP4
    if not isinstance(weight, ScaledScheme):
        return None
    scaling = weight.scaling
    if scaling.block == BLOCKWISE_1X32 and scaling.scale.e8m0_rounding is not None:
        return {FLOAT4_E2M1: MXFP4, FLOAT8_E4M3: MXFP8}.get(scaling.element)
    is_float8 = scaling.element == FLOAT8_E4M3 and scaling.scale.dtype == torch.float32
    return FLOAT if is_float8 and scaling.block in (ROWWISE, BLOCKWISE_128X128) else None


def integer_bits(scheme: AffineScheme) -> int:
    """Bits of the codes."""
    return (scheme.format.quant_max - scheme.format.quant_min).bit_length()


def is_symmetric(scheme: AffineScheme) -> bool:
    """Whether codes are two's complement without a zero point."""
    bits = integer_bits(scheme)
    whole = (scheme.format.quant_min, scheme.format.quant_max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return whole and not scheme.format.has_zero_point


def _integer_problem(weight: AffineScheme) -> str | None:
    if not is_symmetric(weight):
        return (
            "asymmetric integers are refused: transformers loads their packed zero points with a size mismatch, "
            "compressed-tensors' own files included. Use a symmetric scheme"
        )
    if integer_bits(weight) not in _PACKED_BITS:
        return (
            f"{integer_bits(weight)}-bit integers are refused: readers disagree on how they are packed across words. "
            "Use int2-g32, int4-g32 or int8-g32, or format torchao, which does not pack"
        )
    return None


def _weight_arguments(weight: TensorScheme) -> dict[str, Any]:
    if isinstance(weight, AffineScheme):
        size = weight.format.group_size
        strategy = "channel" if size is None else "group"
        return _arguments(integer_bits(weight), "int", strategy, group_size=size)
    if isinstance(weight, Nvfp4Scheme):
        return _arguments(4, "float", "tensor_group", group_size=16) | {"scale_dtype": "torch.float8_e4m3fn"}
    assert isinstance(weight, ScaledScheme)
    if weight.scaling.block == BLOCKWISE_1X32:
        bits = weight.scaling.element.bits
        return _arguments(bits, "float", "group", group_size=32) | {"scale_dtype": "torch.uint8"}
    if weight.scaling.block == BLOCKWISE_128X128:
        return _arguments(8, "float", "block") | {"block_structure": [128, 128]}
    return _arguments(8, "float", "channel")


def _activation_arguments(activation: TensorScheme) -> dict[str, Any] | None:
    """Of an input that is quantized as it comes; None for what the format cannot say."""
    if isinstance(activation, AffineScheme) and activation.format.group_size is None and is_symmetric(activation):
        return _arguments(integer_bits(activation), "int", "token") | {"dynamic": True}
    if isinstance(activation, ScaledScheme) and activation.scaling.element == FLOAT8_E4M3:
        if activation.scaling.block == ROWWISE:
            return _arguments(8, "float", "token") | {"dynamic": True}
        if activation.scaling.block == BLOCKWISE_1X128:
            return _arguments(8, "float", "group", group_size=128) | {"dynamic": True}
    return None


def _arguments(bits: int, kind: str, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group_size,
        "strategy": strategy,
        "dynamic": False,
    }


def pack_integers(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes [rows, columns] of 2, 4 or 8 bits as int32 words [rows, ceil(columns * bits / 32)]."""
    per_word, half = 32 // bits, 2 ** (bits - 1)
    rows, columns = codes.shape
    words = -(-columns // per_word)
    # The smallest code is stored as zero bits, which is what the rest of a row's last word has.
    padded = torch.nn.functional.pad(codes, (0, words * per_word - columns), value=-half).view(rows, words, per_word)
    packed = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        packed |= (padded[..., place].int() + half) << (bits * place)
    return packed


def _integers_from_bytes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes of words in little-endian memory: whole bytes, then parts of bytes."""
    data = words.view(torch.uint8)
    parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return (torch.stack(parts, dim=-1).flatten(-2) - 2 ** (bits - 1)).view(torch.int8)  # modulo 256


def codes_from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """4-bit codes, the low half of a byte first."""
    return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)
