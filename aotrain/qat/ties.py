"""Tied weights: which layers share a Parameter, and whether they may be quantized apart."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tie:
    """Layers that share one weight, by their dotted names; at least two."""

    layers: dict[str, torch.nn.Module]

    def others(self, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """All but one."""
        return {fqn: layer for fqn, layer in self.layers.items() if layer is not module}


def find_ties(model: torch.nn.Module) -> dict[torch.nn.Module, Tie]:
    """The tie of every module whose `weight` is also another module's."""
    users: dict[int, dict[str, torch.nn.Module]] = {}
    for fqn, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), {})[fqn] = module
    ties = [Tie(layers) for layers in users.values() if len(layers) > 1]
    return {module: tie for tie in ties for module in tie.layers.values()}
