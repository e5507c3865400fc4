"""Gradient clipping of offloaded gradients: torch's norm, torch's factor, wherever the gradients live."""

import math

import pytest
import torch
from torch import nn

from aotrain.optim.cpu_offload import CPUOffloadOptimizer
from tests.optim.test_cpu_offload import MODES, assert_same_weights, backward, pair, twins


def norm_of(model: nn.Module, norm_type: float = 2.0) -> torch.Tensor:
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return torch.nn.utils.get_total_norm(grads, norm_type)


@MODES
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_is_that_of_torch(norm_type: float, offload_gradients: bool):
    """Host and device gradients, accumulated over two backward passes; only the order of a sum may differ."""
    models = twins()
    optimizer, _ = pair("adamw", models, offload_gradients=offload_gradients)
    for model in models:
        model[4].weight.requires_grad_(False)
        for seed in range(2):
            backward(model, seed)
    want = norm_of(models[1], norm_type)
    got = optimizer.clip_grad_norm_(math.inf, norm_type)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@MODES
@pytest.mark.parametrize("share", [0.1, 0.9, 10.0])
def test_clipping_by_argument_is_clipping_by_torch(offload_gradients: bool, share: float):
    """Relative to the norm; above 1 nothing is scaled and the weights are the same bits.

    Below, the factors differ by float32 rounding. An SGD step of about 1e-3 then moves by less than 1e-6 of itself.
    """
    models = twins()
    backward(models[1], 0)
    max_norm = share * norm_of(models[1]).item()
    models[1].zero_grad()
    optimizers = pair("sgd", models, offload_gradients=offload_gradients, max_grad_norm=max_norm)
    for seed in range(3):
        backward(models[0], seed)
        optimizers[0].step()
        optimizers[0].zero_grad()
        backward(models[1], seed)
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
        optimizers[1].step()
        optimizers[1].zero_grad()
    if share > 1:
        assert_same_weights(models)
    for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@MODES
def test_clipping_by_method_scales_all_gradients(offload_gradients: bool):
    models = twins()
    optimizer, _ = pair("adamw", models, offload_gradients=offload_gradients)
    backward(models[0], 0)
    before = optimizer.clip_grad_norm_(0.5)
    assert before > 0.5
    assert optimizer.clip_grad_norm_(0.5).item() == pytest.approx(0.5, rel=1e-5)
    # What is accumulated afterwards is not scaled again.
    backward(models[0], 0)
    assert optimizer.clip_grad_norm_(math.inf).item() == pytest.approx(before.item() + 0.5, rel=1e-4)


def test_torch_clips_gradients_on_the_device_to_the_same_bits():
    models = twins()
    for model, optimizer in zip(models, pair("adamw8bit", models), strict=True):
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert_same_weights(models)


@MODES
def test_bfloat16_norm_is_computed_in_float32(offload_gradients: bool):
    """A bfloat16 norm, which is what torch computes, has two digits."""
    models = twins(torch.bfloat16)
    optimizer, _ = pair("adamw8bit", models, offload_gradients=offload_gradients)
    for model in models:
        backward(model, 0)
    exact = math.sqrt(sum(param.grad.double().square().sum().item() for param in models[1].parameters()))
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(exact, rel=1e-5)


@MODES
def test_norms_that_are_not_finite(offload_gradients: bool):
    models = twins()
    optimizer, _ = pair("adamw", models, offload_gradients=offload_gradients)
    backward(models[0], 0)
    models[0][0].bias.grad[0] = math.nan
    with pytest.raises(RuntimeError, match="is nan, want it finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert optimizer.clip_grad_norm_(1.0).isnan()
    optimizer.step()
    assert models[0][2].weight.isnan().all()  # as with torch: it spreads, and is seen


def test_no_gradients_and_bad_arguments():
    optimizer = CPUOffloadOptimizer([nn.Parameter(torch.ones(80, 80))])
    assert optimizer.clip_grad_norm_(1.0) == 0.0
    with pytest.raises(ValueError, match="want > 0"):
        optimizer.clip_grad_norm_(-1.0)
    with pytest.raises(ValueError, match="norm_type: 0"):
        optimizer.clip_grad_norm_(1.0, 0)
