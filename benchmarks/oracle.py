"""What the right answer is: every operation in float64, written from its formula, gradients by hand.

Nothing here calls fasttransfer or autograd, so that an error there cannot hide here. A large case is computed piece
by piece, because float64 copies of it do not fit into memory beside what is being measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

PIECE = 4_000_000  # logits per piece

Answer = list[Tensor]


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Answer:
    """Loss and gradient for the student logits of the mean over rows of `T^2 KL(teacher || student)`."""
    log_p = torch.log_softmax(student.double() / temperature, -1)
    log_q = torch.log_softmax(teacher.double() / temperature, -1)
    q = log_q.exp()
    rows = student.numel() // student.shape[-1]
    loss = temperature**2 * (q * (log_q - log_p)).sum() / rows
    grad = temperature / rows * (log_p.exp() - q)
    return [loss, grad]


def divergence(name: str, student: Tensor, teacher: Tensor) -> Answer:
    """Loss and gradient of the mean over rows of reverse KL, jsd (beta 1/2) or tvd, at T = 1."""
    x, y = torch.log_softmax(student.double(), -1), torch.log_softmax(teacher.double(), -1)
    p, q = x.exp(), y.exp()
    if name == "reverse_kl":
        f = x - y
        loss = (p * f).sum()
    elif name == "jsd":
        m = torch.logaddexp(x, y) - math.log(2)
        f = (x - m) / 2
        loss = (p * f + q * (y - m) / 2).sum()
    else:
        f = (p - q).sign() / 2
        loss = (p - q).abs().sum() / 2
    return [loss / len(p), p * (f - (p * f).sum(-1, keepdim=True)) / len(p)]


def linear_kd(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    temperature: float,
) -> Answer:
    """Loss, gradients for the student's hidden states and head, of `kd` of the logits; some rows at a time."""
    head, teacher = student_head.double(), teacher_head.double()
    loss = torch.zeros((), dtype=torch.float64)
    hidden_grads, head_grad = [], torch.zeros_like(head)
    rows = len(student_hidden)
    step = max(1, PIECE // len(head))
    for first in range(0, rows, step):
        h = student_hidden[first : first + step].double()
        value, grad = kd(h @ head.T, teacher_hidden[first : first + step].double() @ teacher.T, temperature)
        share = len(h) / rows  # of a mean over rows
        loss += value * share
        hidden_grads.append(grad @ head * share)
        head_grad += grad.T @ h * share
    return [loss, torch.cat(hidden_grads), head_grad]


def topk_kd(student: Tensor, values: Tensor, indices: Tensor, tail: str) -> Answer:
    """Loss and gradient of the mean over rows of the KL from k log-probabilities per row, at T = 1."""
    log_p, log_q = torch.log_softmax(student.double(), -1), values.double()
    if tail == "renormalize":
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    q = log_q.exp()
    loss, mass = (q * (log_q - log_p.gather(-1, indices))).sum(-1), q.sum(-1)
    outside = torch.zeros_like(log_p)
    if tail == "bucket":
        log_p_outside = log_p.scatter(-1, indices, -torch.inf)
        log_rest, rest = log_p_outside.logsumexp(-1), 1 - mass
        loss, mass = loss + rest * (rest.log() - log_rest), torch.ones_like(mass)
        outside = (log_p_outside - log_rest[:, None]).exp() * rest[:, None]
    grad = log_p.exp() * mass[:, None] - outside
    grad.scatter_add_(-1, indices, -q)
    return [loss.mean(), grad / len(grad)]


def kd_with_labels(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, label_weight: float
) -> Answer:
    """Loss and gradient of `label_weight * CE + (1 - label_weight) * T^2 KL`, both means over rows."""
    soft_loss, soft_grad = kd(student, teacher, temperature)
    log_p = torch.log_softmax(student.double(), -1)
    rows = torch.arange(student.shape[0])
    hard_loss = -log_p[rows, labels].mean()
    hard_grad = log_p.exp()
    hard_grad[rows, labels] -= 1.0
    hard_grad /= student.shape[0]
    return [
        label_weight * hard_loss + (1.0 - label_weight) * soft_loss,
        label_weight * hard_grad + (1.0 - label_weight) * soft_grad,
    ]


class Distillation:
    """The exact loss and gradient of one kd problem, computed when asked, and kept if they are small."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        temperature: float,
        label_weight: float,
    ) -> None:
        self._student, self._teacher, self._labels = student, teacher, labels
        self._temperature, self._label_weight = temperature, label_weight
        self._kept: list[tuple[slice, Answer]] | None = None

    def error(self, outputs: Sequence[Tensor]) -> float:
        """The larger error of the loss and, where it is among the outputs, of the gradient [rows, V]."""
        if len(outputs) not in (1, 2) or any(output is None for output in outputs):
            return float("inf")
        grad = outputs[1] if len(outputs) == 2 else None
        if outputs[0].numel() != 1 or (grad is not None and grad.numel() != self._student.numel()):
            return float("inf")
        grad = None if grad is None else grad.reshape(self._student.shape)
        loss, wrong, whole = 0.0, 0.0, 0.0
        for rows, (part_loss, part_grad) in self._pieces():
            share = len(part_grad) / len(self._student)  # both losses and gradients are of means over rows
            loss += float(part_loss) * share
            if grad is not None:
                wrong += float((grad[rows].double() - part_grad * share).square().sum())
                whole += float((part_grad * share).square().sum())
        errors = [abs(float(outputs[0].double()) - loss) / max(abs(loss), 1e-300)]
        errors += [] if grad is None else [(wrong / max(whole, 1e-300)) ** 0.5]
        return worst_of(errors)

    def _pieces(self) -> Iterator[tuple[slice, Answer]]:
        if self._kept is not None:
            yield from self._kept
            return
        rows, vocab = self._student.shape
        step = max(1, PIECE // vocab)
        pieces = (slice(first, min(first + step, rows)) for first in range(0, rows, step))
        if rows * vocab <= 3 * PIECE:
            self._kept = [(piece, self._exact(piece)) for piece in pieces]
            yield from self._kept
            return
        for piece in pieces:
            yield piece, self._exact(piece)

    def _exact(self, rows: slice) -> Answer:
        student, teacher = self._student[rows], self._teacher[rows]
        if self._labels is None:
            return kd(student, teacher, self._temperature)
        return kd_with_labels(student, teacher, self._labels[rows], self._temperature, self._label_weight)


class Divergence(Distillation):
    """The same with another divergence, at T = 1."""

    def __init__(self, student: Tensor, teacher: Tensor, name: str) -> None:
        super().__init__(student, teacher, None, 1.0, 0.0)
        self._name = name

    def _exact(self, rows: slice) -> Answer:
        return divergence(self._name, self._student[rows], self._teacher[rows])


def l2sp(params: Sequence[Tensor], start: Sequence[Tensor], had: float, strength: float) -> Iterator[Tensor]:
    """The penalty, then for each parameter the gradient it `had` everywhere plus the penalty's."""
    pairs = list(zip(params, start, strict=True))
    yield strength * torch.stack([(p.double() - p0.double()).square().sum() for p, p0 in pairs]).sum()
    for p, p0 in pairs:
        yield had + 2.0 * strength * (p.double() - p0.double())


def blend(target: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], alpha: float) -> Iterator[Tensor]:
    """`alpha * target + (1 - alpha) * mean(sources)`, tensor by tensor."""
    share = (1.0 - alpha) / len(sources)
    for t, *of_it in zip(target, *sources, strict=True):
        exact = alpha * t.double()
        for source in of_it:
            exact += share * source.double()
        yield exact


def relative_error(outputs: Sequence[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest `||output - exact|| / ||exact||` in a list; infinite for a wrong shape or a NaN."""
    errors, count = [], 0
    for count, truth in enumerate(exact, 1):
        output = outputs[count - 1] if count <= len(outputs) else None
        if output is None or output.shape != truth.shape:
            return float("inf")
        errors.append(float((output.double() - truth).norm() / truth.norm().clamp_min(1e-300)))
    return worst_of(errors) if count == len(outputs) else float("inf")


def worst_of(errors: Iterable[float]) -> float:
    """The largest; infinite if one is NaN, which max() would swallow."""
    worst = 0.0
    for error in errors:
        if not error <= worst:
            worst = error if error == error else float("inf")
    return worst
