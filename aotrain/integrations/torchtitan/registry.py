"""Stock torchtitan configs under torchtitan's own entry point, adapted to this torch and this machine.

    torchrun -m torchtitan.train --module aotrain.integrations.torchtitan.registry --config llama3.llama3_8b
        --override.imports aotrain.integrations.torchtitan.overrides.float8_linear [any other option]

``--config MODEL.FUNCTION`` is function FUNCTION of ``torchtitan.models.MODEL.config_registry``. Every config gets a
sharding backend and a loss that work on the running torch; on a machine without a GPU also the CPU as device,
document-masked SDPA, FSDP for gloo, and weights that do not depend on the number of ranks.

torchtitan cannot be imported on torch 2.11 without ``compat.install``; there use ``train`` with a job file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from aotrain.integrations.torchtitan import compat

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """``registry.<model>.<function>`` as a config function; torchtitan looks names up with getattr."""
    model, dot, function = name.partition(".")
    if not dot or name.startswith("_"):
        raise AttributeError(f"module {__name__} has no attribute {name!r}; want MODEL.FUNCTION, as llama3.llama3_8b")
    return lambda: stock_config(model, function)


def stock_config(model: str, function: str) -> Trainer.Config:
    """Load a stock ``Trainer.Config`` and adapt it.

    Args:
        model: a package in ``torchtitan.models``, such as "llama3".
        function: a function of its config registry, such as "llama3_debugmodel".

    Raises:
        ValueError: there is no such model or function.
    """
    compat.install()
    try:
        configs = importlib.import_module(f"torchtitan.models.{model}.config_registry")
    except ModuleNotFoundError as error:
        raise ValueError(f"--config {model}.{function}: no model {model!r} in torchtitan ({error})") from error
    make = getattr(configs, function, None)
    if make is None:
        names = ", ".join(name for name in vars(configs) if name.startswith(model))
        raise ValueError(f"--config {model}.{function}: no such function; {model} has {names}")
    config = make()
    adapt(config, on_cpu=not torch.cuda.is_available())
    return config


def adapt(config: Trainer.Config, *, on_cpu: bool) -> None:
    """Change, in place, what in a stock ``Trainer.Config`` does not work here.

    Args:
        config: from a stock config function.
        on_cpu: also make it run without a GPU, and tell torchtitan so.
    """
    from torchtitan.components.loss import ChunkedLossWrapper

    config.parallelism.spmd_backend = compat.spmd_backend()
    config.training.disable_cuda_graphs |= on_cpu or not compat.cuda_graphs_work()
    if isinstance(config.loss, ChunkedLossWrapper.Config) and not compat.chunked_loss_works():
        config.loss = config.loss.loss_fn
    if on_cpu:
        _adapt_to_cpu(config)


def _adapt_to_cpu(config: Trainer.Config) -> None:
    from torchtitan.models.common.attention import FlexAttention, VarlenAttention

    from aotrain.integrations.torchtitan import cpu
    from aotrain.integrations.torchtitan.attention import DocumentSDPA
    from aotrain.integrations.torchtitan.fsdp import with_plain_sum
    from aotrain.integrations.torchtitan.weight_init import name_parameter_inits

    cpu.install()
    spec = config.model_spec
    assert spec is not None  # stock configs come with their model
    for kind in (FlexAttention, VarlenAttention):
        for _, node, parent, attr in list(spec.traverse(kind.Config)):
            if type(node) is kind.Config and isinstance(attr, str):
                setattr(
                    parent, attr, DocumentSDPA.Config(param_init=node.param_init, sharding_config=node.sharding_config)
                )
    spec.parallelize_fn = with_plain_sum(spec.parallelize_fn)
    name_parameter_inits(spec.model, config.debug.seed or 0)
