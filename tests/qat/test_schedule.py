"""QATSchedule: off, coming in, on; what it sets, and what it does to a loss."""

import pytest
import torch

from aotrain.qat import QATSchedule, prepare_qat
from tests.qat.models import Model, tokens


def test_shares():
    assert [QATSchedule().mix(step) for step in (0, 1, 99)] == [1.0] * 3
    late = QATSchedule(start_step=3)
    assert [late.mix(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    slow = QATSchedule(start_step=2, anneal_steps=3)
    assert [slow.mix(step) for step in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    with pytest.raises(ValueError, match="want 0 or more"):
        QATSchedule(start_step=-1)
    with pytest.raises(ValueError, match="a model without fake quantizers; prepare it first"):
        QATSchedule().apply(Model(), 0)


def test_outputs_move_from_plain_to_quantized():
    model = Model()
    plain = model(tokens())
    prepare_qat(model, "int2-g32", exclude=())
    quantized = model(tokens())
    schedule = QATSchedule(start_step=1, anneal_steps=3)
    distances = []
    for step in range(6):
        schedule.apply(model, step)
        distances.append((model(tokens()) - plain).norm().item())
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert torch.equal(model(tokens()), quantized)
    schedule.apply(model, 0)
    quantizer = model.block[0].weight_fake_quantizer
    assert not quantizer.enabled
    quantizer.enabled = True  # a consumer's switch finds it as it was
    assert quantizer.mix == 1


def test_gradients_pass_while_it_comes_in():
    model = Model()
    prepare_qat(model, "int4-g32-a8")
    QATSchedule(anneal_steps=1).apply(model, 0)
    model(tokens()).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
