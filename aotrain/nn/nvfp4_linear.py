"""NVFP4Linear: `nn.Linear` whose forward and backward products run in NVFP4.

The parameters are ordinary `nn.Parameter`s named weight and bias and there are no buffers: signs of the Hadamard
transform follow from the configuration, noise from its seed and the gradients. state_dict, optimizers, FSDP2 and
checkpoints see a plain `nn.Linear`.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149. The paper keeps embeddings, the output
head and the last 15 % of the layers or so in bfloat16: `aotrain.nn.keep_tail_layers`.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from aotrain.formats import hadamard_signs
from aotrain.formats.hadamard import HADAMARD_SIZE
from aotrain.nn.float8_linear import clone_as
from aotrain.ops import Nvfp4Method, check_save_for_backward
from aotrain.ops.nvfp4_linear import NVFP4_RECIPE, Nvfp4Recipe, nvfp4_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class NVFP4TrainingConfig:
    """How a layer trains in NVFP4. One configuration serves all layers of a model.

    Raises:
        ValueError: not 16 signs of 1 and -1, or an unknown `save_for_backward`.
    """

    # 16 signs of 1 and -1 of the random Hadamard transform; None: those that follow from the seed. The paper uses
    # one vector for all layers and all of a training.
    rht_sign_vector: tuple[int, ...] | None = None
    # Of the signs and of the noise of stochastic rounding. Runs with equal seeds and equal data are equal bit for bit.
    seed: int = 0
    # Which parts of the method apply; the default is the paper's.
    recipe: Nvfp4Recipe = NVFP4_RECIPE
    # Compute products in bfloat16 or float32 arithmetic even on hardware that multiplies NVFP4.
    emulate: bool = False
    # What of the input is kept for backward, without effect on any bit: "high_precision" the input itself, which other
    # layers may keep anyway; "quantized" 0.57 bytes per element.
    save_for_backward: str = "high_precision"

    def __post_init__(self) -> None:
        check_save_for_backward(self.save_for_backward)
        signs = self.rht_sign_vector
        if signs is not None and (len(signs) != HADAMARD_SIZE or any(sign not in (1, -1) for sign in signs)):
            raise ValueError(f"rht_sign_vector got {signs}; want {HADAMARD_SIZE} of 1 and -1, or None.")

    def signs(self) -> tuple[int, ...]:
        """The given signs, or those that follow from the seed."""
        if self.rht_sign_vector is not None:
            return tuple(self.rht_sign_vector)
        return tuple(int(sign) for sign in hadamard_signs(self.seed).tolist())

    def to_recipe(self) -> Nvfp4Method:
        """What `aotrain.ops.scaled_grouped_mm` takes, for experts."""
        return Nvfp4Method(recipe=self.recipe, signs=self.signs(), seed=self.seed)


class NVFP4Linear(torch.nn.Linear):
    """Linear layer computed by `aotrain.ops.nvfp4_linear`.

    Args:
        in_features: K, any size.
        out_features: N, any size.
        bias: whether to add a learned bias; unlike `nn.Linear`'s, off by default, as in torchao.
        device: of the parameters.
        dtype: of the parameters.
        config: default `NVFP4TrainingConfig()`.
        rht_sign_vector: replaces the configuration's.
    """

    config: NVFP4TrainingConfig
    rht_sign_vector: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: NVFP4TrainingConfig | None = None,
        rht_sign_vector: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_config(config, rht_sign_vector)

    @classmethod
    def from_float(cls, mod: torch.nn.Linear, config: NVFP4TrainingConfig | None = None) -> Self:
        """An NVFP4Linear with the same Parameter objects, hooks, buffers and training flag as `mod`."""
        new = clone_as(mod, cls)
        new._set_config(config, None)
        return new

    from_linear = from_float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]; see `aotrain.ops.nvfp4_linear`.

        Raises:
            NotImplementedError: the weight is split by tensor parallelism.
        """
        if hasattr(self.weight, "device_mesh"):  # a DTensor
            raise NotImplementedError(
                "NVFP4Linear got a weight that is split by tensor parallelism, which NVFP4 layers do not do yet; leave "
                "the layer out of the conversion, or train it in float8."
            )
        return nvfp4_linear(
            input,
            self.weight,
            self.bias,
            recipe=self.config.recipe,
            signs=self.rht_sign_vector,
            seed=self.config.seed,
            emulate=self.config.emulate,
            save_for_backward=self.config.save_for_backward,
        )

    def extra_repr(self) -> str:
        """nn.Linear's, with what differs from the paper's recipe."""
        recipe = self.config.recipe
        differs = [f"{name}={value}" for name in recipe.__slots__ if (value := getattr(recipe, name)) is not True]
        return ", ".join([super().extra_repr(), "nvfp4", *differs])

    def _set_config(self, config: NVFP4TrainingConfig | None, rht_sign_vector: tuple[int, ...] | None) -> None:
        config = NVFP4TrainingConfig() if config is None else config
        if rht_sign_vector is not None:
            config = replace(config, rht_sign_vector=tuple(rht_sign_vector))
        self.config = config
        # Here and not in forward: a compiled forward would trace how they follow from the seed.
        self.rht_sign_vector = config.signs()
