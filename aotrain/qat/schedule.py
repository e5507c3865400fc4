"""QATSchedule: when fake quantization starts, and how fast it comes in.

    step <  start_step                   off: plain training
    step <  start_step + anneal_steps    x + mix * (values - x), mix = (step - start_step + 1) / (anneal_steps + 1)
    then                                 on

Starting late lets a fresh optimizer or a fresh head settle first; annealing spares training the jump. `apply` only sets
attributes of fake quantizers, so it costs nothing; call it before the forward pass of every step, in any loop. A graph
that `torch.compile` made is one of a value of `mix`: prefer a start step without annealing there, or few steps of it.
"""

from dataclasses import dataclass

import torch

from aotrain.qat.fake_quantizer import FakeQuantizerBase


@dataclass(frozen=True)
class QATSchedule:
    """When fake quantization starts, and over how many steps it comes in.

    Attributes:
        start_step: steps of plain training before.
        anneal_steps: steps between plain and fully quantized.

    Raises:
        ValueError: a negative number of steps.
    """

    start_step: int = 0
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        if self.start_step < 0 or self.anneal_steps < 0:
            raise ValueError(
                f"QATSchedule got start_step={self.start_step} and anneal_steps={self.anneal_steps}; want 0 or more."
            )

    def mix(self, step: int) -> float:
        """Share of quantized values at a step, counted from 0."""
        since = step - self.start_step
        return 0.0 if since < 0 else min(1.0, (since + 1) / (self.anneal_steps + 1))

    def apply(self, model: torch.nn.Module, step: int) -> None:
        """Set the fake quantizers of a prepared model for a step.

        Args:
            model: prepared; may be wrapped, compiled or sharded.
            step: optimizer steps done before.

        Raises:
            ValueError: there are no fake quantizers.
        """
        quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizerBase)]
        if not quantizers:
            raise ValueError(
                "QATSchedule got a model without fake quantizers; prepare it first: prepare_qat(model, ...)."
            )
        mix = self.mix(step)
        for quantizer in quantizers:
            quantizer.enabled = mix > 0
            if mix > 0:  # nobody must find it at 0 after enabling by hand
                quantizer.mix = mix
