"""The Triton Adam kernel against aotrain.optim's reference step, bit for bit, under the interpreter; GPU twins at the end."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from aotrain.formats.codebook import decode_dynamic, dynamic_codebook
from aotrain.kernels.adam import AdamScalars
from aotrain.kernels.triton import _adam_launch as launch
from aotrain.optim.base import _round_to_bfloat16
from aotrain.optim.state import Dynamic4bitMoment, Dynamic8bitMoment, Float8Moment, Float32Moment
from aotrain.optim.step import adam_scalars, adam_update
from aotrain.formats import BFLOAT16, philox_bits16, round_stochastic
from aotrain.testing import assert_bitwise_equal

FORMATS = {"dynamic8": Dynamic8bitMoment, "dynamic4": Dynamic4bitMoment, "float8_e4m3fn": Float8Moment}
STATES = [*FORMATS, "float32"]
DTYPES = [torch.float32, torch.bfloat16]


def scalars_of(step: int, *, lr: float = 1e-3, decoupled: bool = True, **overrides: Any) -> AdamScalars:
    common = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **overrides}
    return adam_scalars(lr=lr, decoupled=decoupled, step=step, **common)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits, but NaNs of any payload are equal: IEEE 754 leaves it open which operand's payload survives."""
    if actual.is_floating_point():
        actual, expected = (torch.where(x.isnan(), torch.full_like(x, torch.nan), x) for x in (actual, expected))
    assert_bitwise_equal(actual, expected, what=what)


class Model:
    """Parameters and state stepped by the reference and by the kernel."""

    def __init__(self, params: Sequence[torch.Tensor], state: str, block_size: int = 256, device: str = "cpu") -> None:
        self.state, self.block_size, self.device = state, block_size, device
        if state == "float32":
            self.moments = Float32Moment("m"), Float32Moment("v")
        else:
            self.moments = FORMATS[state]("m", True, block_size), FORMATS[state]("v", False, block_size)
        self.want = [
            [param.clone(), *self._encode(torch.zeros(param.shape), torch.zeros(param.shape))] for param in params
        ]
        self.got = [[x.clone().to(device) for x in tensors] for tensors in self.want]

    def _encode(self, m: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if self.state == "float32":
            return [m, v]
        return [x for moment, value in zip(self.moments, (m, v), strict=True) for x in moment.encode(value)]

    def _decode(self, state: list[torch.Tensor], shape: torch.Size) -> list[torch.Tensor]:
        if self.state == "float32":
            return state
        pairs = zip(self.moments, (state[:2], state[2:]), strict=True)
        return [moment.decode(*codes_scale, shape) for moment, codes_scale in pairs]

    def step(
        self,
        grads: Sequence[torch.Tensor],
        scalars: AdamScalars,
        *,
        maximize: bool = False,
        keys: Sequence[int] = (),
        indices: Sequence[tuple[int, int]] = (),
    ) -> None:
        for i, grad in enumerate(grads):
            param, *state = self.want[i]
            sign = -1 if maximize else 1
            values = self._decode(state, param.shape)
            updated, new = adam_update(param.float(), sign * grad.float(), values, scalars)
            if keys:
                updated = self._round(updated, keys[i], indices[i])
            self.want[i] = [updated.to(param.dtype), *self._encode(*new)]
        columns = list(zip(*self.got, strict=True))
        params, m, m_scale, v, v_scale = columns if len(columns) == 5 else (columns[0], columns[1], [], columns[2], [])
        launch.adam_(
            params, [grad.to(self.device) for grad in grads], m, m_scale, v, v_scale,
            state_format=self.state, block_size=self.block_size, maximize=maximize, **scalars._asdict(),
            rounding_keys=keys, first_indices=[i for i, _ in indices], row_strides=[s for _, s in indices],
        )  # fmt: skip

    @staticmethod
    def _round(updated: torch.Tensor, key: int, index: tuple[int, int]) -> torch.Tensor:
        rows = updated.view(updated.shape[0], -1)
        at = index[0] + torch.arange(rows.shape[0])[:, None] * index[1] + torch.arange(rows.shape[1])
        rounded = round_stochastic(rows, BFLOAT16, philox_bits16(key, at)).float()
        return torch.where(rows.isfinite(), rounded, rows).view(updated.shape)

    def check(self) -> None:
        for i, (got, want) in enumerate(zip(self.got, self.want, strict=True)):
            for j, (x, y) in enumerate(zip(got, want, strict=True)):
                same(x.cpu(), y, f"tensor {j} of parameter {i}")


SHAPES = {
    "whole": [(4, 512), (2, 3, 256), (1, 1024)],
    "ragged": [(3, 300), (5, 64), (2, 7, 33), (1, 257), (4, 512)],
    "odd": [(3, 301), (2, 7, 5)],
}


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("shapes", SHAPES)
    @pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("state", STATES)
    def test_many_steps(self, state: str, param_dtype: torch.dtype, grad_dtype: torch.dtype, shapes: str) -> None:
        model = Model([torch.randn(shape).to(param_dtype) for shape in SHAPES[shapes]], state)
        for step in range(1, 4):
            grads = [torch.randn(s) * torch.exp(torch.randn(s) * 3) for s in SHAPES[shapes]]
            model.step([grad.to(grad_dtype) for grad in grads], scalars_of(step))
            model.check()
