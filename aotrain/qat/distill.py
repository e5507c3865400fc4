"""Knowledge distillation for training through quantization: the unquantized model teaches the quantized one.

    p = softmax(teacher / T)     q = softmax(student / T)     loss = T^2 * mean over rows of sum_v p(v) log(p(v) / q(v))

That is the forward KL divergence; its gradient with respect to the student's logits is `T * (q - p) / rows`. It is zero
where the student is the teacher, so a prepared model starts near its minimum, whatever the labels.

Logits are taken in chunks of rows and differentiated in the forward pass: beside the two tensors of logits and one
gradient in the student's dtype, only a chunk in float32 lives. Hinton et al., "Distilling the knowledge in a neural
network" (2015), for T and its square.
"""

from typing import Any

import torch

CHUNK_ROWS = 256


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Forward KL divergence of a student from its teacher, in nats per row, times the squared temperature.

    Args:
        student_logits: [..., V], differentiable once.
        teacher_logits: [..., V], any floating dtype; not differentiated.
        labels: [...]; rows whose label is `ignore_index` do not count. None: all rows count.
        temperature: softens both distributions.
        ignore_index: see `labels`.
        chunk_rows: rows that are in float32 at a time.

    Returns:
        float32 scalar; 0 when no row counts.

    Raises:
        ValueError: shapes that differ, or a temperature or chunk that is not positive.
    """
    shape = student_logits.shape
    if teacher_logits.shape != shape or (labels is not None and labels.shape != shape[:-1]):
        given = "none" if labels is None else tuple(labels.shape)
        raise ValueError(
            f"distillation_loss got student logits {tuple(shape)}, teacher logits "
            f"{tuple(teacher_logits.shape)}, labels {given}; want [..., V] twice, and labels [...]."
        )
    if not temperature > 0 or chunk_rows < 1:
        raise ValueError(
            f"distillation_loss got temperature={temperature} and chunk_rows={chunk_rows}; want both above zero."
        )
    rows = None if labels is None else (labels.reshape(-1) != ignore_index)
    student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits.detach()))
    return _ForwardKL.apply(student, teacher, rows, temperature, chunk_rows)


class _ForwardKL(torch.autograd.Function):
    """Saves the gradient of the loss with respect to the student's logits, in their dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        counted: torch.Tensor | None,
        temperature: float,
        chunk_rows: int,
    ) -> torch.Tensor:
        count = torch.tensor(len(student)) if counted is None else counted.sum()
        count = count.to(student.device).clamp(min=1).float()
        total = torch.zeros((), device=student.device)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            log_q, log_p = ((logits[chunk].float() / temperature).log_softmax(-1) for logits in (student, teacher))
            p = log_p.exp()
            # 0 * (-inf - ...) is not 0: words that the teacher excludes do not count.
            terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
            kept = torch.ones_like(terms, dtype=torch.bool) if counted is None else counted[chunk]
            total += torch.where(kept, terms, torch.zeros_like(terms)).sum()
            if grad is not None:
                slope = (log_q.exp() - p) * (temperature / count)
                grad[chunk] = torch.where(kept[:, None], slope, torch.zeros_like(slope)).to(grad.dtype)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total * (temperature**2 / count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  the decorator hides the signature
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0].to(grad.dtype)).to(grad.dtype), None, None, None, None
