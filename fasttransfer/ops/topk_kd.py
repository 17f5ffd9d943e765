"""``torch.ops.fasttransfer.topk_kd``: distillation from the k largest of the teacher's outputs, gradient included.

Per row, with ``p = softmax(s/T)`` over all V columns, K the columns that the teacher names and ``q_v`` its mass there::

    loss = sum_K q_v (log q_v - log p_v) + q_rest (log q_rest - log p_rest)      (times (1-w) T^2, and the label term)
    grad = M p_v - q_v  in K,   M p_v - q_rest p_v / p_rest  elsewhere,   M = sum_K q + q_rest        (times (1-w) T)

``tail="renormalize"``: ``q = softmax(values/T)`` over K, ``q_rest = 0``. ``"zero"``: ``q = exp(values)``,
``q_rest = 0``. ``"bucket"``: ``q = exp(values)``, ``q_rest = max(0, 1 - sum_K q)``, 0 where K is every column.

An entry exists unless its index is -1, its value is -inf, or its index has an entry further left in the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttransfer.ops.divergences import centred, exp_sum
from fasttransfer.ops.kd import (
    ROW_OPTIONS,
    _fake_loss,
    _fake_scale,
    add_label_term,
    apply_upstream,
    chunks,
    half_scale,
    refuse_double_backward,
    row_weights,
)
from fasttransfer.ops.library import compute_dtype, define


# --------------------------------------------------------------------------------------------- pure torch
def _entries(values: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column of each entry, ``columns`` where it does not exist; values with -inf there; rows that are broken."""
    broken = ((indices < -1) | (indices >= columns)).any(-1)
    exists = (indices >= 0) & (indices < columns) & (values != -torch.inf)
    column = torch.where(exists, indices, columns)
    ordered, order = column.sort(dim=-1, stable=True)
    again = torch.zeros_like(exists)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    column = torch.where(torch.zeros_like(exists).scatter(-1, order, again), columns, column)
    exists = column < columns
    values = torch.where(exists, values, -torch.inf)
    return column, values, broken | (values.isnan() | (values == torch.inf)).any(-1)


def _top(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of rows [rows, 1], and what to subtract: 0 where that is -inf."""
    top = x.amax(-1, keepdim=True)
    return top, top.masked_fill(top == -torch.inf, 0.0)


def _topk_rows(
    s: Tensor,  # [rows, V] compute dtype
    values: Tensor | None,  # [rows, k] acc
    indices: Tensor,  # [rows, k] int64
    temperature: Tensor,  # [rows] acc
    kd_weight: Tensor,  # [rows] acc, d loss / d divergence
    ce_weight: Tensor | None,  # [rows] acc, d loss / d cross entropy
    labels: Tensor | None,  # [rows], valid where ce_weight != 0
    smoothing: float,
    tail: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss per row (acc dtype) and gradient (compute dtype) of rows that are all counted."""
    acc, columns = temperature.dtype, s.shape[-1]
    loss = torch.zeros_like(temperature)
    grad = torch.zeros_like(s) if want_grad else None
    ds = centred(s)
    broken = torch.isnan(ds.sum(-1)) | (ds.amax(-1) == -torch.inf)
    if values is not None:
        column, t, broken_teacher = _entries(values, indices, columns)
        broken_teacher |= (column == columns).all(-1) & (tail == "renormalize")
        broken = broken | (broken_teacher & (kd_weight != 0))
        exists = column < columns
        inv_t = (1 / temperature)[:, None]
        # Outside of K, relative to the largest there; in K, relative to the largest of all, in double.
        inside = s.new_zeros(s.shape[0], columns + 1, dtype=torch.bool).scatter(-1, column, True)[:, :columns]
        rest = torch.where(inside, -torch.inf, s)
        top_rest, ref_rest = _top(rest)
        e_rest, sum_rest = exp_sum((rest - ref_rest) * inv_t.to(s.dtype), acc)
        s_k = torch.where(exists, s.gather(-1, torch.where(exists, column, 0)).to(acc), -torch.inf)
        top = torch.maximum(s_k.amax(-1, keepdim=True), top_rest.to(acc))
        ref = top.masked_fill(top == -torch.inf, 0.0)
        e_k = ((s_k - ref) * inv_t).exp()
        to_ref = ((top_rest - ref) * inv_t).exp()[:, 0]  # 0 for a tail of -inf
        total = sum_rest * to_ref + e_k.sum(-1)
        log_p = (s_k - ref) * inv_t - total.log()[:, None]
        if tail == "renormalize":
            log_q = (t * inv_t).log_softmax(-1)
        else:
            log_q = t
        q = torch.where(exists, log_q.exp(), 0.0)
        terms = torch.where(q == 0, 0.0, q * (log_q - log_p))
        mass = torch.ones_like(loss) if tail == "renormalize" else q.sum(-1)
        q_rest = torch.zeros_like(loss)
        kd = terms.sum(-1)
        if tail == "bucket":
            whole = exists.sum(-1) == columns
            q_rest = torch.where(whole, 0.0, (1 - mass).clamp_min(0.0))
            mass = mass + q_rest
            log_p_rest = ((ref_rest - ref) * inv_t)[:, 0] + sum_rest.log() - total.log()
            kd = kd + torch.where(q_rest == 0, 0.0, q_rest * (q_rest.log() - log_p_rest))
        loss += torch.where(kd_weight != 0, kd_weight * kd, 0.0)
        if grad is not None:
            weight = kd_weight / temperature
            on_rest = mass * to_ref / total - torch.where(sum_rest == 0, 0.0, q_rest / sum_rest)
            wide = torch.cat(
                (e_rest * (weight * on_rest).to(s.dtype)[:, None], torch.zeros_like(s[:, :1])), -1
            )
            g_k = weight[:, None] * (mass[:, None] * e_k / total[:, None] - q)
            grad += wide.scatter(-1, column, g_k.to(s.dtype))[:, :columns]
    if ce_weight is not None and labels is not None:
        broken |= add_label_term(ds, labels, ce_weight, smoothing, loss, grad)
    loss = torch.where(broken, torch.nan, loss)
    if grad is not None:
        grad = torch.where(broken[:, None], torch.nan, grad)
    return loss, grad


def _reference(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    grad: Tensor | None,  # [..., V] of the student's shape and dtype, overwritten
    labels: Tensor | None,
    row_weight: Tensor | None,
    row_temperature: Tensor | None,
    num_items: Tensor | None,
    num_items_constant: list[float],
    temperature: float,
    label_weight: float,
    label_smoothing: float,
    ignore_index: int,
    distill_ignored: bool,
    vocab_size: int,
    reduction: str,
    scale_by_t2: bool,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the factor per row that turns the stored gradient into the gradient (fp16 only, else empty)."""
    compute = compute_dtype(student, values)
    leading = student.shape[:-1]
    rows = leading.numel()
    t, kd_weight, ce_weight = row_weights(
        rows, leading[0] if leading else 1, student, labels, row_weight, row_temperature, num_items,
        num_items_constant, temperature, label_weight, ignore_index, distill_ignored, reduction, scale_by_t2,
    )  # fmt: skip
    flat_labels = None if labels is None else labels.reshape(-1)
    flat_values, flat_indices = (x.reshape(rows, x.shape[-1]) for x in (values, indices))
    half = grad is not None and student.dtype == torch.float16
    scale = torch.ones(rows if half else 0, dtype=torch.float32, device=student.device)
    losses = torch.zeros(rows, dtype=t.dtype, device=student.device)
    distills = labels is None or label_weight != 1

    for index, flat in chunks(leading, student.shape[-1]):
        s = student[index][..., :vocab_size].reshape(-1, vocab_size).to(compute)
        kd_w = kd_weight[flat]
        ce_w = None if ce_weight is None else ce_weight[flat]
        counted = kd_w != 0 if ce_w is None else (kd_w != 0) | (ce_w != 0)
        # Rows that are not counted must not spread their NaN: they are computed on zeros, with weight 0.
        s = torch.where(counted[:, None], s, 0.0)
        q = torch.where((kd_w != 0)[:, None], flat_values[flat].to(t.dtype), 0.0) if distills else None
        y = None if flat_labels is None else flat_labels[flat]
        loss, g = _topk_rows(
            s, q, flat_indices[flat].long(), t[flat], kd_w, ce_w, y, label_smoothing, tail, grad is not None
        )
        losses[flat] = loss
        if grad is None or g is None:
            continue
        if half:
            bound = kd_w / t[flat] if ce_w is None else kd_w / t[flat] + ce_w
            up = half_scale(bound)
            g = g * up[:, None]
            scale[flat] = 1 / up
        out = grad[index]
        out[..., :vocab_size] = g.reshape(out[..., :vocab_size].shape).to(grad.dtype)
        out[..., vocab_size:] = 0

    return (losses.reshape(leading) if reduction == "none" else losses.sum()).to(compute), scale


def _topk_reference(
    student: Tensor, values: Tensor, indices: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    want_grad = args[-1]
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if want_grad else None
    loss, scale = _reference(student, values, indices, grad, *args[:-1])
    return loss, student.new_empty(0) if grad is None else grad, scale


def _topk_reference_(student: Tensor, values: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _reference(student, values, indices, student, *args)


# ------------------------------------------------------------------------------------------------- fakes
def _topk_fake(student: Tensor, values: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, _, _, want_grad = args[-4:]
    return (
        _fake_loss(student, values, reduction),
        student.new_empty(student.shape if want_grad else 0),
        _fake_scale(student, want_grad),
    )


def _topk_fake_(student: Tensor, values: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(student, values, args[-3]), _fake_scale(student, True)


_OPERANDS = "Tensor values, Tensor indices"
topk_kd_op = define(
    "topk_kd",
    f"(Tensor student, {_OPERANDS}, {ROW_OPTIONS}, str tail, bool want_grad) -> (Tensor, Tensor, Tensor)",
    _topk_reference,
    _topk_fake,
)
topk_kd_inplace_op = define(
    "topk_kd_",
    f"(Tensor(a!) student, {_OPERANDS}, {ROW_OPTIONS}, str tail) -> (Tensor, Tensor)",
    _topk_reference_,
    _topk_fake_,
    mutates=[0],
)


# ---------------------------------------------------------------------------------------------- autograd
class TopKFunction(torch.autograd.Function):
    """``loss = TopKFunction.apply(student, values, indices, options)``, as KDFunction."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, student: Tensor, values: Tensor, indices: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        loss, grad, grad_scale = topk_kd_op(student, values, indices, *options, True)
        ctx.save_for_backward(grad, grad_scale)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:  # noqa: D102
        refuse_double_backward()
        if upstream is None:
            return None, None, None, None
        grad, grad_scale = ctx.saved_tensors
        return apply_upstream(grad, upstream, grad_scale), None, None, None


class TopKInplaceFunction(torch.autograd.Function):
    """As TopKFunction, but the memory of the student's logits is overwritten: see KDInplaceFunction."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, memory: Tensor, shape: torch.Size, values: Tensor, indices: Tensor, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.shape = shape
        loss, grad_scale = topk_kd_inplace_op(
            memory if memory.shape == shape else memory.view(shape), values, indices, *options
        )
        ctx.mark_dirty(memory)
        ctx.save_for_backward(memory, grad_scale)
        ctx.set_materialize_grads(False)
        return loss, memory

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, reused: Tensor | None) -> Any:  # noqa: D102
        refuse_double_backward()
        if reused is not None:
            raise RuntimeError(
                "student_logits was overwritten with its gradient by topk_kd_loss(..., inplace=True) and then used "
                "again in the graph. Use it before, pass a clone, or leave inplace=False."
            )
        if upstream is None:
            return None, None, None, None, None
        memory, grad_scale = ctx.saved_tensors
        grad = apply_upstream(memory.detach().view(ctx.shape), upstream, grad_scale, shared=True)
        return grad.view(memory.shape), None, None, None, None
