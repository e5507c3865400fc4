"""Our optimizers in transformers' Trainer and in TRL's trainers, chosen by name as the `optim` key of a recipe does.

    args = TrainingArguments(..., optim_args="bf16_stochastic_round=true")
    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("adamw_8bit", args))

transformers has no way to register a name of `optim`, so the class travels in the Trainer's `optimizer_cls_and_kwargs`.
What travels there is a factory, which the Trainer calls with the model: only the model knows which parameters are
embeddings and what every parameter is called. Scheduler, clipping, accumulation and checkpoints stay the Trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from aotrain.integrations.optim_args import parse_optim_args
from aotrain.integrations.optimizers import canonical_name, optimizer_class
from aotrain.optim import CPUOffloadOptimizer, precision_groups

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_cls_and_kwargs(
    name: str | None,
    args: TrainingArguments,
    *,
    bits: Mapping[str, int | str] | None = None,
    model: torch.nn.Module | None = None,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """The argument of that name of `transformers.Trainer`, `trl.SFTTrainer` and the like, for one of our optimizers.

    Learning rate, betas, epsilon and weight decay are those of `args`; biases and norms are not decayed, as the Trainer
    has it. Everything else comes from `args.optim_args`, "key=value,key=value":

        block_size, bf16_stochastic_round, seed, bits, maximize, amsgrad    of the optimizer
        embedding_bits    of the state of embeddings: 32 (default), 8, 4, fp8, or own for the optimizer's own format
        offload           true: state and arithmetic in host memory, by `aotrain.optim.CPUOffloadOptimizer`

    Args:
        name: of the optimizer, as in `aotrain.integrations.optimizers`; None takes `args.optim`, which can be any of
            the 8-bit and 4-bit names that transformers knows.
        args: `TrainingArguments` or a subclass, `trl.SFTConfig` for one.
        bits: regular expression -> precision of the state of parameters with a matching name; see `precision_groups`.
        model: if given, `bits` is checked against its parameters now and not when training begins.

    Raises:
        ValueError: a name that is not in the table, or an option that is unknown, given twice or out of range.
    """
    name = canonical_name(name) if name is not None else _name_of(args)
    if model is not None:
        precision_groups(model, bits)
    settings = optimizer_settings(
        name,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        optim_args=args.optim_args,
    )
    return OptimizerFactory, settings | {"bits_by_name": dict(bits or {})}


def optimizer_settings(
    name: str,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    optim_args: str | None = None,
) -> dict[str, Any]:
    """Arguments of `OptimizerFactory()(model, ...)` for one of our optimizers.

    Args:
        name: a key of `aotrain.integrations.optimizers.OPTIMIZERS`.
        lr, betas, eps, weight_decay: of the update; Lion has no eps.
        optim_args: see `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: an option that is unknown, given twice or out of range.
    """
    settings: dict[str, Any] = {"name": name, "lr": lr, "betas": betas, "weight_decay": weight_decay}
    if not name.startswith("lion"):
        settings["eps"] = eps
    return settings | {"bits_by_name": {}} | parse_optim_args(optim_args, name)


def _name_of(args: TrainingArguments) -> str:
    try:
        return canonical_name(str(getattr(args.optim, "value", args.optim)))
    except ValueError as error:
        raise ValueError(
            f"TrainingArguments.optim: {error}. Set it, or give the name here: "
            "optimizer_cls_and_kwargs('adamw_8bit', args)."
        ) from None


class OptimizerFactory:
    """Builds an optimizer from a model; the Trainer calls `OptimizerFactory()(model, **kwargs)`."""

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        name: str,
        weight_decay: float,
        bits_by_name: Mapping[str, int | str],
        embedding_bits: int | str | None = 32,
        offload: bool = False,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of a model, in named groups by precision and weight decay.

        Args:
            model: as the Trainer has it when it creates the optimizer; it may be sharded later (FSDP2).
            name: of the optimizer.
            weight_decay: of the parameters that the Trainer decays.
            bits_by_name, embedding_bits: see `aotrain.optim.precision_groups`.
            offload: put the optimizer into a `CPUOffloadOptimizer`.
            **options: of the optimizer's class.

        Raises:
            ValueError: a pattern of `bits_by_name` that matches nothing, or `offload` under FSDP2.
        """
        from transformers import Trainer

        # The rule is a method of the Trainer that does not look at its instance.
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        groups = [
            group
            for by_bits in precision_groups(model, bits_by_name, embedding_bits=embedding_bits)
            for group in _by_decay(by_bits, decayed, weight_decay)
        ]
        if "block_size" in options:
            # Groups with bits of their own would take the default of those bits.
            groups = [{**group, "block_size": options["block_size"]} for group in groups]
        cls = optimizer_class(name)
        if not offload:
            return cls(groups, **options)
        _check_offload()
        return CPUOffloadOptimizer(groups, cls, **options)


def _by_decay(group: dict[str, Any], decayed: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """The decayed and the undecayed part of a parameter group, those that are not empty."""
    members = list(zip(group["param_names"], group["params"], strict=True))
    parts = []
    for decay, part in (
        (weight_decay, [member for member in members if member[0] in decayed]),
        (0.0, [member for member in members if member[0] not in decayed]),
    ):
        if part:
            names, params = zip(*part, strict=True)
            parts.append({**group, "params": list(params), "param_names": list(names), "weight_decay": decay})
    return parts


def _check_offload() -> None:
    from accelerate.state import AcceleratorState

    # Accelerate shards after the optimizer is built and puts other parameters into its groups; the host copies would
    # stay those of the old ones.
    if AcceleratorState._shared_state and AcceleratorState().is_fsdp2:
        raise ValueError(
            "optim_args: offload=true does not work when Accelerate shards the model by FSDP2 after the optimizer is "
            "built; use FSDP's own offload (fsdp_config: offload_params), which puts the optimizer on the host too."
        )
