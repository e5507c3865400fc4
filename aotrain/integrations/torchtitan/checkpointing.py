"""Selective activation checkpointing of blocks with low-precision layers.

torchtitan's own keeps every second `aten.mm` and does not know our products: it would compute every one of them twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.distributed.activation_checkpoint import SelectiveAC

from aotrain.nn import save_products


class SelectiveProducts(SelectiveAC):
    """``SelectiveAC`` that keeps every second matrix product, in whatever format, and what torchtitan always keeps."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def _wrap_block(self, module: torch.nn.Module, *, base_fqn: str | None = None) -> torch.nn.Module:
        config = self.config
        products = {torch.ops.aten.mm.default, torch.ops.aten.linear.default}
        return checkpoint_wrapper(
            module,
            context_fn=save_products(every=2, extra_ops=self.get_save_ops() - products),
            preserve_rng_state=config.preserve_rng_state,
            determinism_check=config.determinism_check,
            early_stop=False,
            debug=config.debug,
        )
