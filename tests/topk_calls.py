"""topk_kd_loss in float64 from the formula, and how its tests call and compare it.

The label term, weights and divisors are those of kd, so they are asked of its oracle: with a distillation part of
weight 0 for the label term, and of `kl_row` by this file's own row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fasttransfer import topk_kd_loss
from tests import oracle


def topk_row(
    s: Tensor, values: list[float], indices: list[int], tail: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """The divergence of one float64 row and its gradient for s, columns one after the other."""
    nan = torch.full_like(s, math.nan)
    entries: dict[int, float] = {}
    for value, index in zip(values, indices, strict=True):
        if not -1 <= index < len(s):
            return nan[0], nan
        if index >= 0 and value != -math.inf:
            entries.setdefault(index, value)
    p = oracle.softmax(s / temperature)
    bad = any(math.isnan(v) or v == math.inf for v in entries.values())
    if p.isnan().any() or bad or (tail == "renormalize" and not entries):
        return nan[0], nan
    inside = list(entries)
    outside = [v for v in range(len(s)) if v not in entries]
    z = torch.tensor([entries[v] for v in inside], dtype=torch.float64)
    log_q = z / temperature - oracle.log_sum_exp(z / temperature) if tail == "renormalize" else z
    log_p = s / temperature - oracle.log_sum_exp(s / temperature)
    q = torch.zeros_like(s)
    loss = torch.zeros((), dtype=torch.float64)
    for v, log in zip(inside, log_q, strict=True):
        q[v] = log.exp()
        if q[v] > 0:
            loss += q[v] * (log - log_p[v])
    mass, direction = q.sum(), torch.zeros_like(s)
    if tail == "bucket" and outside and mass < 1:
        rest, tail_logits = 1 - mass, s[outside] / temperature
        log_p_rest = torch.tensor(-math.inf, dtype=torch.float64)
        if tail_logits.max() > -math.inf:
            log_sum = oracle.log_sum_exp(tail_logits)
            log_p_rest = log_sum - oracle.log_sum_exp(s / temperature)
            direction[outside] = rest * (tail_logits - log_sum).exp()
        loss += rest * (rest.log() - log_p_rest)
        mass = mass + rest
    return loss, (mass * p - q - direction) / temperature


def topk_oracle(
    student: Tensor, values: Tensor, indices: Tensor, labels: Tensor | None = None, *, tail: str = "renormalize",
    teacher_form: str = "logits", temperature: float | Tensor = 1.0, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradient of its sum for the student's logits, both float64, by way of `oracle.kd`'s rows."""
    columns = options.get("vocab_size") or student.shape[-1]
    rows = list(
        zip(values.reshape(-1, values.shape[-1]).double().tolist(), indices.reshape(-1, indices.shape[-1]).tolist(),
            strict=True)
    )  # fmt: skip

    # oracle.kd asks kl_row of each distilled row: its "teacher" here is the number of the row.
    numbers = torch.arange(len(rows), dtype=torch.float64).reshape(student.shape[:-1])[..., None]
    numbers = numbers.expand(*student.shape[:-1], columns)
    kl_row = oracle.kl_row
    try:
        oracle.kl_row = lambda s, t, temperature: topk_row(s, *rows[int(t[0])], tail, temperature)
        return oracle.kd(student, numbers, labels, temperature=temperature, **options)
    finally:
        oracle.kl_row = kl_row


def topk_and_grad(student: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`topk_kd_loss` and the gradient of its sum. The strides of `student` are kept, its memory is shared."""
    leaf = student.detach().requires_grad_()
    loss = topk_kd_loss(leaf, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def check_topk(student: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`topk_and_grad`, after asserting that both are the oracle's to the tolerance of the dtypes, norm-wise.

    Also that evaluation without a gradient gives the same loss, and that shapes and dtypes are the stated ones.
    """
    loss, grad = topk_and_grad(student, values, *args, **options)
    exact_loss, exact_grad = topk_oracle(student, values, *args, **options)
    double = torch.float64 in (student.dtype, values.dtype)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert (grad.shape, grad.dtype) == (student.shape, student.dtype)
    oracle.assert_norm_close(loss, exact_loss)
    finite = exact_grad.isfinite().all() and not exact_loss.isinf().any()
    oracle.assert_norm_close(grad, exact_grad) if finite else None
    with torch.no_grad():
        evaluated = topk_kd_loss(student, values, *args, **options)
    torch.testing.assert_close(evaluated, loss, rtol=0, atol=0, equal_nan=True)
    return loss, grad
