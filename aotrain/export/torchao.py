"""torchao's safetensors format, written without it: for ExecuTorch, and for transformers with torchao installed.

A quantized parameter `m.weight` is stored as plain tensors `m._weight_qdata`, `m._weight_scale` and so on. The header
of every file lists all parameters of the checkpoint, those of other shards too, because readers merge the headers and
keep the last; an entry names the class of the tensor, its attributes and its parts. config.json holds the configuration
that would have made them.

| scheme | tensor class | parts |
|---|---|---|
| int2 to int8 in groups, 8da4w | IntxUnpackedToInt8Tensor | qdata int8, scale in the model's dtype, zero_point int8 |
| int8 | Int8Tensor | qdata int8, scale float32 [out, 1], zero_point int8 |
| fp8, fp8-weight-only | Float8Tensor | qdata e4m3, scale float32 [out, 1] |

Codes are not packed: an int4 weight takes a byte on disk.

Source: the files that torchao 0.18 writes; `_version` 2 of its configurations.
"""

import json
from typing import Any

import torch

from aotrain.export.base import ExportFormat, Layer, Plan, Reader
from aotrain.export.compressed_tensors import integer_bits, is_symmetric
from aotrain.export.parts import rows_of
from aotrain.export.selection import is_expert
from aotrain.formats import FLOAT8_E4M3, ROWWISE, MappingType
from aotrain.quantization.schemes import AffineScheme, Encoded, ScaledScheme, Scheme, TensorScheme

INTX, INT8, FLOAT8 = "IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor"


def _typed(kind: str, data: Any, version: int | None = None) -> dict[str, Any]:
    """A value as torchao's JSON spells it."""
    tag: dict[str, Any] = {"_type": kind}
    if version is not None:
        tag["_version"] = version
    return tag | {"_data": data}


_SYMMETRIC = _typed("MappingType", "SYMMETRIC")
_ASYMMETRIC = _typed("MappingType", "ASYMMETRIC")
_E4M3 = _typed("torch.dtype", "float8_e4m3fn")
_AUTO = _typed("KernelPreference", "AUTO")
_MM = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
_INTX_FORMAT = {
    "intx_packing_format": _typed("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": _typed("IntxChooseQParamsAlgorithm", "AFFINE"),
}


class TorchAo(ExportFormat):
    """Layouts of this module's docstring."""

    name = "torchao"

    def refusal(self, scheme: Scheme) -> str | None:
        if isinstance(scheme.weight, AffineScheme) and not is_symmetric(scheme.weight):
            return "asymmetric integer weights are refused, as in compressed-tensors. Use a symmetric scheme"
        if tensor_class(scheme) is None:
            return (
                f"torchao has no configuration for weights {scheme.weight} with activations {scheme.activation}: "
                "use format compressed-tensors"
            )
        return None

    def refusal_of_embeddings(self, scheme: Scheme) -> str | None:
        return None

    def server_view(self, scheme: Scheme) -> str:
        return f"torchao {_configuration(scheme)['_type']}, weights are {tensor_class(scheme)}"

    def refusal_of_plan(self, plan: Plan) -> str | None:
        if any(map(is_expert, plan.layers)):
            return (
                "transformers leaves experts in this format at their initial values, without an error: use format "
                "compressed-tensors, or exclude '*.experts.*'"
            )
        return None

    def pack(self, layer: Layer, scheme: Scheme, encoded: Encoded) -> dict[str, torch.Tensor]:
        stem = f"{layer.name}._weight"
        scale = encoded.scale if tensor_class(scheme) == INTX else encoded.scale.float()
        parts = {f"{stem}_qdata": encoded.data, f"{stem}_scale": scale}
        if tensor_class(scheme) != FLOAT8:
            parts[f"{stem}_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        return parts

    def decode(self, layer: Layer, scheme: Scheme, read: Reader, part: slice) -> torch.Tensor:
        stem = f"{layer.name}._weight"
        data, scale = read(f"{stem}_qdata")[part], rows_of(read(f"{stem}_scale"), layer.shape[0], part)
        if tensor_class(scheme) == INT8:
            assert isinstance(scheme.weight, AffineScheme)
            scale = scale.to(scheme.weight.format.scale_dtype or layer.dtype)
        return scheme.weight.decode(Encoded(data, scale), layer.dtype)

    def update_config(self, config: dict[str, Any], plan: Plan) -> None:
        described: dict[str, Any] = {
            "quant_method": "torchao",
            "quant_type": {"default": _configuration(plan.scheme)},
            "modules_to_not_convert": list(plan.ignored),
        }
        if any(layer.embedding for layer in plan.layers.values()):
            described["include_input_output_embeddings"] = True
        config["quantization_config"] = described

    def metadata(self, plan: Plan) -> dict[str, str]:
        entries: dict[str, Any] = {key: {"_type": "Tensor"} for key in plan.keys}
        for key, layer in plan.layers.items():
            entries[key] = _tensor_entry(layer, plan.scheme)
        return {key: json.dumps(entry) for key, entry in entries.items()} | {
            "tensor_names": json.dumps(list(entries)),
            "format": "pt",
        }


def tensor_class(scheme: Scheme) -> str | None:
    """Class of the tensors that carry a scheme's weights; None if none does."""
    weight, activation = scheme.weight, scheme.activation
    if isinstance(weight, ScaledScheme):
        rows = weight.scaling.element == FLOAT8_E4M3 and weight.scaling.block == ROWWISE
        plain = rows and weight.scaling.scale.dtype == torch.float32
        return FLOAT8 if plain and activation in (None, weight) else None
    if not isinstance(weight, AffineScheme) or not is_symmetric(weight):
        return None
    if integer_bits(weight) == 8 and weight.format.group_size is None:
        return INT8 if activation is None or _tokens(activation, MappingType.SYMMETRIC) else None
    return INTX if activation is None or _tokens(activation, MappingType.ASYMMETRIC) else None


def _tokens(activation: TensorScheme, mapping: MappingType) -> bool:
    """Whether an activation is 8-bit integers per token."""
    if not isinstance(activation, AffineScheme) or activation.format.group_size is not None:
        return False
    return integer_bits(activation) == 8 and activation.format.mapping is mapping


def _configuration(scheme: Scheme) -> dict[str, Any]:
    weight, dynamic = scheme.weight, scheme.activation is not None
    row = _typed("PerRow", {"dim": -1}, 1)
    if tensor_class(scheme) == FLOAT8:
        if not dynamic:
            data = {"weight_dtype": _E4M3, "set_inductor_config": False, "granularity": row}
            return _typed("Float8WeightOnlyConfig", data, 2)
        data = {
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "granularity": [row, row],
            "mm_config": _typed("Float8MMConfig", _MM, 1),
            "kernel_preference": _AUTO,
            "set_inductor_config": False,
        }
        return _typed("Float8DynamicActivationFloat8WeightConfig", data, 2)
    assert isinstance(weight, AffineScheme)
    if tensor_class(scheme) == INT8:
        data = {"granularity": row, "set_inductor_config": False}
        if not dynamic:
            return _typed("Int8WeightOnlyConfig", data, 2)
        return _typed("Int8DynamicActivationInt8WeightConfig", data | {"act_mapping_type": _SYMMETRIC}, 2)
    size = weight.format.group_size
    granularity = _typed("PerAxis", {"axis": 0}, 1) if size is None else _typed("PerGroup", {"group_size": size}, 1)
    dtype = _typed("torch.dtype", f"int{integer_bits(weight)}")
    if not dynamic:
        data = {"weight_dtype": dtype, "granularity": granularity, "mapping_type": _SYMMETRIC}
        return _typed("IntxWeightOnlyConfig", data | _INTX_FORMAT, 2)
    data = {
        "weight_dtype": dtype,
        "weight_granularity": granularity,
        "weight_mapping_type": _SYMMETRIC,
        "act_mapping_type": _ASYMMETRIC,
    }
    return _typed("Int8DynamicActivationIntxWeightConfig", data | _INTX_FORMAT, 2)


def _tensor_entry(layer: Layer, scheme: Scheme) -> dict[str, Any]:
    """What the header says about a quantized parameter."""
    kind, dynamic = tensor_class(scheme), scheme.activation is not None and not layer.embedding
    row = _typed("PerRow", {"dim": -1})
    parts = ["qdata", "scale"] if kind == FLOAT8 else ["qdata", "scale", "zero_point"]
    size = layer.shape[1]
    if kind == FLOAT8:
        act = {
            "float8_dtype": _E4M3,
            "granularity": row,
            "mm_config": _typed("Float8MMConfig", _MM),
            "hp_value_lb": None,
            "hp_value_ub": None,
            "kernel_preference": _AUTO,
        }
        data = {"mm_config": _typed("Float8MMConfig", _MM) if dynamic else None, "kernel_preference": _AUTO}
        data["act_quant_kwargs"] = _typed("QuantizeTensorToFloat8Kwargs", act) if dynamic else None
    elif kind == INT8:
        act = {"granularity": row, "mapping_type": _SYMMETRIC, "reduce_range": False}
        kwargs = _typed("QuantizeTensorToInt8Kwargs", act) if dynamic else None
        data = {"reduce_range": False, "act_quant_kwargs": kwargs}
    else:
        assert isinstance(scheme.weight, AffineScheme)
        size = scheme.weight.format.group_size or size
        data = {
            "target_dtype": _typed("torch.dtype", f"int{integer_bits(scheme.weight)}"),
            "activation_quantization": "int8_asym_per_token" if dynamic else None,
        }
    data |= {"block_size": [1, size], "dtype": _typed("torch.dtype", str(layer.dtype).removeprefix("torch."))}
    return {"_type": kind, "_data": data, "_tensor_data_names": parts}
