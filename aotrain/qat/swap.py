"""Swapping layers for fake-quantized ones and back, one at a time or everywhere in a model."""

import sys
from collections.abc import Mapping

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from aotrain.nn import Float8Linear, NVFP4Linear
from aotrain.qat.embedding import FakeQuantizedEmbedding
from aotrain.qat.linear import FakeQuantizedLinear, MXFakeQuantizedLinear, NVFP4FakeQuantizedLinear
from aotrain.qat.mx_config import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
from aotrain.qat.tensor_config import FakeQuantizeConfigBase

FakeQuantized = FakeQuantizedLinear | FakeQuantizedEmbedding
_LINEAR_CLASSES: dict[type, type[FakeQuantizedLinear]] = {
    MXFakeQuantizeConfig: MXFakeQuantizedLinear,
    NVFP4FakeQuantizeConfig: NVFP4FakeQuantizedLinear,
}


def fake_quantized(
    module: torch.nn.Module,
    activation_config: FakeQuantizeConfigBase | None,
    weight_config: FakeQuantizeConfigBase | None,
) -> FakeQuantized:
    """The fake-quantized layer with a layer's parameters.

    Raises:
        ValueError: a layer that has no fake-quantized form or has it already, a configuration of activations for an
            embedding, or a scheme that cannot take the layer's shape.
    """
    problem = unsupported(module)
    if problem is not None:
        raise ValueError(problem)
    if isinstance(module, torch.nn.Embedding):
        if activation_config is not None:
            raise ValueError(
                "Activation fake quantization is not supported for embedding: its input is indices; want a "
                "weight_config alone."
            )
        return FakeQuantizedEmbedding.from_embedding(module, weight_config)
    assert isinstance(module, torch.nn.Linear)
    cls = _LINEAR_CLASSES.get(type(weight_config), FakeQuantizedLinear)
    return cls.from_linear(module, activation_config, weight_config)


def unsupported(module: torch.nn.Module) -> str | None:
    """Why a module has no fake-quantized form; None when it has one."""
    kind = type(module).__name__
    if isinstance(module, FakeQuantized):
        return f"Module of type '{kind}' is prepared already; swap it back first: QATConfig(step=\"convert\")."
    if isinstance(module, Float8Linear | NVFP4Linear):
        return f"Module of type '{kind}' does not have QAT support: it trains in low precision; unconvert() the model."
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"Module of type '{kind}' does not have QAT support: MultiheadAttention only reads its weight."
    if type(module).forward not in (torch.nn.Linear.forward, torch.nn.Embedding.forward):
        return f"Module of type '{kind}' does not have QAT support; want a Linear or an Embedding."
    return None


def plain(module: FakeQuantized) -> torch.nn.Linear | torch.nn.Embedding:
    """The plain layer with the parameters of a fake-quantized one."""
    return module.to_linear() if isinstance(module, FakeQuantizedLinear) else module.to_embedding()


def swap(model: torch.nn.Module, replacements: Mapping[torch.nn.Module, torch.nn.Module]) -> None:
    """Put modules in the place of others, wherever they are referenced, in place.

    Raises:
        ValueError: the model itself is to be replaced, which cannot be done in place; the model is sharded.
    """
    check_not_sharded(model)
    if model in replacements:
        raise ValueError(
            f"got a {type(model).__name__} itself, which cannot be swapped in place; want a model that holds it. "
            "FakeQuantizedLinear.from_linear and FakeQuantizedEmbedding.from_embedding return the new layer."
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def check_not_sharded(model: torch.nn.Module) -> None:
    """Raise ValueError for a model of which FSDP manages a part: it gathers the weights of the layers it met."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    if fsdp is None:
        return
    for fqn, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"got a model that FSDP shards already ({fqn or 'itself'!r}), which gathers weights for the layers it "
                "met and not for those in their place. Prepare before fully_shard. To convert, gather a checkpoint, "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and load it into a model "
                "that was prepared alike and not sharded; or export it."
            )
