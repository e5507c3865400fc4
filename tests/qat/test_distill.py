"""Distillation: the divergence and its gradient by definition, rows that do not count, and the memory it takes."""

import pytest
import torch

from aotrain.qat import distillation_loss
from tests.qat.models import randn


def by_definition(student, teacher, labels, temperature: float) -> torch.Tensor:
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    rows = rows if labels is None else rows[labels != -100]
    return temperature**2 * rows.mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("with_labels", [True, False])
def test_value_and_gradient(temperature: float, with_labels: bool):
    student, teacher = randn(3, 5, 37).requires_grad_(), randn(3, 5, 37, seed=1)
    labels = torch.arange(15).view(3, 5) if with_labels else None
    if labels is not None:
        labels[labels % 4 == 0] = -100
    got = distillation_loss(student, teacher, labels, temperature=temperature, chunk_rows=4)
    want = by_definition(student, teacher, labels, temperature)
    assert torch.allclose(got, want, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(3 * got, student), torch.autograd.grad(3 * want, student), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
        if labels is not None:
            assert (mine[labels == -100] == 0).all()


def test_a_student_that_is_its_teacher():
    logits = randn(4, 9)
    student = logits.clone().requires_grad_()
    loss = distillation_loss(student, logits)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_bfloat16_logits_have_bfloat16_gradients_and_float32_loss():
    student = randn(6, 50, dtype=torch.bfloat16).requires_grad_()
    loss = distillation_loss(student, randn(6, 50, seed=1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16


def test_no_rows_and_words_that_the_teacher_excludes():
    student, teacher = randn(4, 9).requires_grad_(), randn(4, 9, seed=1)
    loss = distillation_loss(student, teacher, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()
    teacher[:, 3] = -torch.inf
    masked = student.detach().clone()
    masked[:, 3] = -torch.inf
    assert distillation_loss(masked, teacher).isfinite()


def test_only_chunks_are_in_float32():
    """Largest float32 tensor that is made: a chunk, not the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                sizes.append(result.numel())
            return result

    student, teacher = (randn(64, 100, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    student.requires_grad_()
    with Record():
        distillation_loss(student, teacher, chunk_rows=8).backward()
    assert max(sizes) == 8 * 100


def test_errors():
    with pytest.raises(ValueError, match=r"want \[..., V\] twice, and labels"):
        distillation_loss(randn(2, 3), randn(2, 4))
    with pytest.raises(ValueError, match=r"labels \(3,\); want"):
        distillation_loss(randn(2, 3), randn(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="want both above zero"):
        distillation_loss(randn(2, 3), randn(2, 3), temperature=0)
