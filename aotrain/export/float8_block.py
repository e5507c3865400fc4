"""float8-block: e4m3 weights with a float32 scale per 128 x 128 block, as DeepSeek-V3's checkpoints store them.

`m.weight` is float8_e4m3fn, `m.weight_scale_inv` float32 [ceil(out / 128), ceil(in / 128)]. Despite its name the scale
multiplies on dequantization. vLLM, SGLang and transformers read it (`quant_method: fp8`); blocks at the border may be
smaller than 128.

`float8_block_weights` yields the same tensors without a file, for pushing the weights of a model in training into an
inference engine, as reinforcement learning does every few steps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from aotrain.export.base import ExportFormat, Layer, Plan, Reader
from aotrain.export.parts import encode_in_parts, rows_of
from aotrain.export.selection import (
    HEAD,
    HIGH_PRECISION,
    is_stacked_experts,
    reason_to_skip,
    refuse_stacked_experts,
)
from aotrain.formats import BLOCKWISE_128X128, FLOAT8_E4M3, SCALE_FORMATS, Scaling
from aotrain.quantization.schemes import Encoded, ScaledScheme, Scheme, get_scheme

_BLOCKS = ScaledScheme(Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["float32"], block=BLOCKWISE_128X128))


class Float8Block(ExportFormat):
    """Layout of this module's docstring."""

    name = "float8-block"

    def refusal(self, scheme: Scheme) -> str | None:
        return None if scheme.weight == _BLOCKS else "float8-block carries the scheme fp8-block only"

    def server_view(self, scheme: Scheme) -> str:
        return "quant_method fp8, e4m3 in blocks of 128 x 128, dynamic activations; vLLM: Fp8LinearMethod"

    def pack(self, layer: Layer, scheme: Scheme, encoded: Encoded) -> dict[str, torch.Tensor]:
        return {layer.key: encoded.data, f"{layer.key}_scale_inv": encoded.scale}

    def decode(self, layer: Layer, scheme: Scheme, read: Reader, part: slice) -> torch.Tensor:
        scale = rows_of(read(f"{layer.key}_scale_inv"), layer.shape[0], part)
        return scheme.weight.decode(Encoded(read(layer.key)[part], scale), layer.dtype)

    def update_config(self, config: dict[str, Any], plan: Plan) -> None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(plan.ignored),
        }


def float8_block_weights(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    exclude: Sequence[str] = (HEAD,),
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model in the float8-block serving format, one after the other.

    Nothing is collected: beyond what the source holds there is one gathered tensor and its codes at a time. A DTensor
    is gathered with `full_tensor`, which is collective: every rank has to go through the whole iterator.

    Args:
        source: a module (its state_dict), a mapping, or (name, tensor) pairs, with the names that the server knows.
        exclude: fnmatch patterns of module names that stay dense; embeddings, norms and routers always do.
        dtype: of floating tensors that stay dense; None: as they are.

    Yields:
        (name, tensor) on the tensor's device: `m.weight` e4m3 and then `m.weight_scale_inv` float32 for linear
        layers, other tensors under their name.

    Raises:
        ValueError: a tensor with the weights of several experts, or weights that are not float32, bfloat16 or float16.
    """
    scheme = get_scheme("fp8-block")
    for name, tensor in _pairs(source):
        if is_stacked_experts(name, tensor.shape, exclude):
            refuse_stacked_experts([name])
        full = _full(tensor)
        if reason_to_skip(name, full.shape, exclude) is not None:
            yield name, full.to(dtype) if dtype is not None and full.is_floating_point() else full
            continue
        if full.dtype not in HIGH_PRECISION:
            raise ValueError(
                f"float8_block_weights got {name} of dtype {full.dtype}; want float32, bfloat16 or float16."
            )
        encoded = encode_in_parts(scheme.weight, full, None, None)
        del full
        yield name, encoded.data
        yield f"{name}_scale_inv", encoded.scale


def _pairs(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> Iterable[tuple[str, torch.Tensor]]:
    if isinstance(source, torch.nn.Module):
        return source.state_dict().items()
    if isinstance(source, Mapping):
        return cast("Mapping[str, torch.Tensor]", source).items()
    return source


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded over ranks; duck-typed, so that torch.distributed is not imported."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()
