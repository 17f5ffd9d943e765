"""``torch.ops.fasttransfer.distill``: what ``kd`` computes, for every divergence and with everything around it.

Per row, from the student's and the teacher's logits s and t::

    z  = c tanh(s/c)                       softcap, of each side; a logit of -inf stays -inf
    x  = (z - mean z) / (deviation z + 1e-7)   standardize: for the divergence, over logits above -inf
    loss = (1-w) T^2 D(softmax(x_t/T), softmax(x_s/T))  +  w CE(label, softmax(z_s))

Gradients for the student's logits and for the teacher's, and statistics of the rows, come from the same passes. The
divergences: ``ops/divergences.py``. Forward KL with nothing around it is ``kd``, which is faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer.ops import divergences
from fasttransfer.ops.divergences import Pair, Terms, Value, pair_of
from fasttransfer.ops.kd import (
    ROW_OPTIONS,
    apply_upstream,
    chunks,
    half_scale,
    refuse_double_backward,
    row_weights,
)
from fasttransfer.ops.library import compute_dtype, define

# Columns of the statistics: KL(q || p) and CE of the label, the entropies of p and q (all at T but for CE, in nats, of
# the rows that have them, else 0), and whether both have the same first maximum.
STATS = ("kl", "ce", "student_entropy", "teacher_entropy", "agreement")
_DEVIATION_EPS = 1e-7

_OPTIONS = (
    "str divergence, float[] divergence_args, bool standardize, float[] softcap, bool want_teacher_grad, "
    "bool want_stats"
)


class Side(NamedTuple):
    """One side's logits as they enter the loss, and what its gradient is carried back by."""

    z: Tensor  # capped
    x: Tensor  # and standardized
    cap: float
    moments: Moments | None  # None: not standardized


class Moments(NamedTuple):
    """Of the logits above -inf of a row, ``[rows, 1]``: how many, their mean, their squared distance from it."""

    number: Tensor
    mean: Tensor  # double
    square: Tensor

    @property
    def n_1(self) -> Tensor:
        """What the variance is divided by: Bessel's correction, as in the authors' code. One logit deviates by 0."""
        return (self.number - 1).clamp_min(1)

    @property
    def deviation(self) -> Tensor:
        """The deviation, double."""
        return torch.sqrt(self.square / self.n_1)


# --------------------------------------------------------------------------------------------- pure torch
def capped(raw: Tensor, cap: float) -> Tensor:
    """The softcap; 0: none."""
    return raw if cap == 0 else torch.where(raw == -torch.inf, raw, cap * torch.tanh(raw / cap))


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type != "mps" else x


def moments_of(z: Tensor) -> Moments:
    """The moments of each row."""
    finite = z > -torch.inf
    count = finite.sum(-1, keepdim=True)
    wide = _wide(torch.where(finite, z, 0.0))
    mean = wide.sum(-1, keepdim=True) / count
    return Moments(count, mean, torch.where(finite, wide - mean, 0.0).square().sum(-1, keepdim=True))


def side_of(z: Tensor, cap: float, moments: Moments | None) -> Side:
    """Of capped logits, with the moments of their rows where they are to be standardized."""
    if moments is None:
        return Side(z, z, cap, None)
    x = (_wide(z) - moments.mean) / (moments.deviation + _DEVIATION_EPS)
    return Side(z, torch.where(z > -torch.inf, x, -torch.inf).to(z.dtype), cap, moments)


def _side(raw: Tensor, cap: float, standardize: bool) -> Side:
    z = capped(raw, cap)
    return side_of(z, cap, moments_of(z) if standardize else None)


def along(grad: Tensor, side: Side) -> Tensor:
    """``sum grad x`` of a gradient for x, ``[rows, 1]``: what standardizing takes out of it."""
    return torch.where(side.x > -torch.inf, grad * side.x, 0.0).sum(-1, keepdim=True)


def through_standardize(grad: Tensor, side: Side, grad_along: Tensor | None = None) -> Tensor:
    """The gradient for z from that for x. Gradients of softmaxes sum to 0, so the mean's part vanishes."""
    if side.moments is None:
        return grad
    if grad_along is None:
        grad_along = along(grad, side)
    deviation = side.moments.deviation.to(grad.dtype)
    scale = deviation + _DEVIATION_EPS
    # deviation = 0: it has no derivative, and 0 is taken.
    slope = torch.where(deviation > 0, grad_along * scale / (deviation * side.moments.n_1), 0.0)
    return torch.where(side.x > -torch.inf, (grad - side.x * slope) / scale, 0.0)


def through_softcap(grad: Tensor, side: Side) -> Tensor:
    """The gradient for the logits from that for z."""
    if side.cap == 0:
        return grad
    return torch.where(side.z == -torch.inf, 0.0, grad * (1 - (side.z / side.cap).square()))


def _divergence(
    name: str,
    args: list[float],
    s: Tensor,
    t: Tensor,
    index: Tensor | None,
    temperature: Tensor,
    want_s: bool,
    want_t: bool,
) -> Value:
    if name == "decoupled":
        assert index is not None
        return divergences.decoupled(s, t, index, temperature, (args[0], args[1]), want_s, want_t)
    pair = pair_of(s, t, temperature)
    if name == "forward_kl":
        return divergences.forward_kl(pair, want_s, want_t)
    if name == "reverse_kl":
        return divergences.reverse_kl(pair, want_s, want_t)
    return divergences.value_of(terms_of(name, args, pair), pair, want_s, want_t)


def terms_of(name: str, args: list[float], pair: Pair) -> Terms:
    """Of a divergence that is a sum of such."""
    return divergences.jsd(pair, args[0]) if name == "jsd" else divergences.tvd(pair)


def _broken(raw: Tensor) -> Tensor:
    """Rows of which no softmax can be taken: NaN, +inf, or -inf throughout."""
    top = raw.amax(-1)
    return torch.isnan(top) | torch.isinf(top)


def _entropy(x: Tensor, temperature: Tensor) -> Tensor:
    d = divergences.centred(x)
    e, total = divergences.exp_sum(d * (1 / temperature).to(x.dtype)[:, None], temperature.dtype)
    return entropy_from(weighted(e, d, temperature.dtype), total, temperature)


def weighted(e: Tensor, d: Tensor, acc: torch.dtype) -> Tensor:
    """``sum e d``, 0 where there is no mass."""
    return torch.where(e == 0, 0.0, e * d).sum(-1, dtype=acc)


def entropy_from(sum_ed: Tensor, total: Tensor, temperature: Tensor) -> Tensor:
    """Of a softmax, from the sums of its row."""
    return torch.log(total) - sum_ed / (total * temperature)


def label_loss(
    total: Tensor, of_label: Tensor, sum_d: Tensor | None, columns: int | Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The smoothed cross entropy and the plain one, from ``sum exp(d)``, the label's d and ``sum d`` of a row."""
    plain = torch.log(total) - of_label
    ce = torch.zeros_like(total)
    if smoothing != 1:  # 0 * inf = 0
        ce = (1 - smoothing) * plain
    if sum_d is not None:
        ce = ce + smoothing * (torch.log(total) - sum_d / columns)
    return ce, plain


def label_gradient(
    e: Tensor,
    total: Tensor,
    ce_weight: Tensor,
    index: Tensor,
    columns: int | Tensor,
    smoothing: float,
    here: Tensor | None = None,
) -> Tensor:
    """Of ``ce_weight CE`` for the logits; ``here [rows, 1]``: whether the label's column is among these."""
    of_ce = e * (ce_weight / total).to(e.dtype)[:, None]
    if smoothing:
        of_ce = of_ce - (ce_weight * smoothing / columns).to(e.dtype)[:, None]
    at_label = (ce_weight * (smoothing - 1)).to(e.dtype)[:, None]
    of_ce.scatter_add_(-1, index, at_label if here is None else torch.where(here, at_label, 0.0))
    return torch.where((ce_weight != 0)[:, None], of_ce, 0.0)


class _Rows(NamedTuple):
    loss: Tensor  # [rows] acc
    student: Tensor | None  # [rows, V] compute dtype
    teacher: Tensor | None
    stats: Tensor | None  # [rows, 5] acc


def _distill_rows(
    raw_s: Tensor,  # [rows, V] compute dtype
    raw_t: Tensor | None,  # [rows, V]; None where no row has a divergence
    temperature: Tensor,  # [rows] acc
    kd_weight: Tensor,  # [rows] acc, d loss / d divergence
    ce_weight: Tensor | None,  # [rows] acc, d loss / d cross entropy
    labels: Tensor | None,  # [rows]
    labelled: Tensor | None,  # [rows] bool: has a label
    smoothing: float,
    divergence: str,
    args: list[float],
    standardize: bool,
    softcap: list[float],
    want: tuple[bool, bool, bool],
) -> _Rows:
    """Rows that are all counted."""
    want_s, want_t, want_stats = want
    columns = raw_s.shape[-1]
    student = _side(raw_s, softcap[0], standardize)
    loss = torch.zeros_like(temperature)
    grad_s = torch.zeros_like(raw_s) if want_s else None
    grad_t = torch.zeros_like(raw_s if raw_t is None else raw_t) if want_t else None
    stats = torch.zeros(len(loss), len(STATS), dtype=loss.dtype, device=loss.device) if want_stats else None
    broken = _broken(raw_s)

    index = None
    if labels is not None and labelled is not None:
        out_of_range = labelled & ((labels < 0) | (labels >= columns))
        if divergence == "decoupled" or ce_weight is not None:
            broken = broken | out_of_range
        index = torch.where(labelled & ~out_of_range, labels, 0)[:, None]

    if raw_t is not None:
        teacher = _side(raw_t, softcap[1], standardize)
        broken_t = _broken(raw_t)
        broken = broken | broken_t
        value, of_s, of_t = _divergence(
            divergence, args, student.x, teacher.x, index, temperature, want_s, want_t
        )
        loss = loss + torch.where(kd_weight != 0, kd_weight * value, 0.0)
        weight = kd_weight.to(raw_s.dtype)[:, None]
        if grad_s is not None and of_s is not None:
            grad_s = grad_s + through_standardize(of_s * weight, student)
        if of_t is not None:
            grad_t = through_softcap(through_standardize(of_t * weight, teacher), teacher)
        if stats is not None:
            stats[:, 0] = divergences.kl_of(pair_of(student.x, teacher.x, temperature))
            stats[:, 3] = _entropy(teacher.x, temperature)
            stats[:, 4] = (student.z.argmax(-1) == teacher.z.argmax(-1)).to(loss.dtype)
    if stats is not None:
        stats[:, 2] = _entropy(student.x, temperature)

    if ce_weight is not None and index is not None and labelled is not None:
        d = divergences.centred(student.z)
        e, total = divergences.exp_sum(d, loss.dtype)
        of_label = d.gather(-1, index)[:, 0].to(loss.dtype)
        sum_d = d.sum(-1, dtype=loss.dtype) if smoothing else None
        ce, plain_ce = label_loss(total, of_label, sum_d, columns, smoothing)
        loss = loss + torch.where(ce_weight != 0, ce_weight * ce, 0.0)
        if grad_s is not None:
            grad_s = grad_s + label_gradient(e, total, ce_weight, index, columns, smoothing)
        if stats is not None:
            stats[:, 1] = torch.where(labelled, plain_ce, 0.0)

    if grad_s is not None:
        grad_s = through_softcap(grad_s, student)
    return _Rows(
        torch.where(broken, torch.nan, loss),
        None if grad_s is None else torch.where(broken[:, None], torch.nan, grad_s),
        None if grad_t is None else torch.where(broken[:, None], torch.nan, grad_t),
        None if stats is None else torch.where(broken[:, None], torch.nan, stats),
    )


class Gradient:
    """Where one side's gradient is stored: rounded once, in fp16 by a power of two per row."""

    def __init__(self, out: Tensor, rows: int, vocab_size: int) -> None:
        self.out, self.vocab_size = out, vocab_size
        half = out.dtype == torch.float16
        self.scale = torch.ones(rows if half else 0, dtype=torch.float32, device=out.device)

    def put(self, index: Any, flat: slice, grad: Tensor) -> None:
        """The gradient of some rows."""
        if self.scale.numel():
            up = half_scale(grad.abs().amax(-1))
            grad = grad * up[:, None]
            self.scale[flat] = 1 / up
        out = self.out[index]
        out[..., : self.vocab_size] = grad.reshape(out[..., : self.vocab_size].shape).to(out.dtype)
        out[..., self.vocab_size :] = 0


def _reference(
    student: Tensor,
    teacher: Tensor,
    student_grad: Tensor | None,  # [..., V] of the student's shape and dtype, overwritten
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
    divergence: str,
    divergence_args: list[float],
    standardize: bool,
    softcap: list[float],
    want_teacher_grad: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the student gradient's factors, the teacher's gradient and its factors, statistics."""
    compute = compute_dtype(student, teacher)
    leading = student.shape[:-1]
    rows = leading.numel()
    t, kd_weight, ce_weight = row_weights(
        rows, leading[0] if leading else 1, student, labels, row_weight, row_temperature, num_items,
        num_items_constant, temperature, label_weight, ignore_index, distill_ignored, reduction, scale_by_t2,
    )  # fmt: skip
    flat_labels = None if labels is None else labels.reshape(-1)
    labelled = None if flat_labels is None else flat_labels != ignore_index
    losses = torch.zeros(rows, dtype=t.dtype, device=student.device)
    stats = torch.zeros(rows if want_stats else 0, len(STATS), dtype=compute, device=student.device)
    teacher_grad = teacher.new_empty(teacher.shape if want_teacher_grad else 0)
    sides: list[Gradient | None] = [
        None if student_grad is None else Gradient(student_grad, rows, vocab_size),
        Gradient(teacher_grad, rows, vocab_size) if want_teacher_grad else None,
    ]
    # What is looked at only for the statistics is looked at all the same.
    distills = labels is None or label_weight != 1 or want_stats

    for index, flat in chunks(leading, student.shape[-1]):
        s = student[index][..., :vocab_size].reshape(-1, vocab_size).to(compute)
        q = teacher[index][..., :vocab_size].reshape(-1, vocab_size).to(compute) if distills else None
        kd_w = kd_weight[flat]
        ce_w = None if ce_weight is None else ce_weight[flat]
        counted = kd_w != 0 if ce_w is None else (kd_w != 0) | (ce_w != 0)
        # Rows that are not counted must not spread their NaN: they are computed on zeros, with weight 0.
        s = torch.where(counted[:, None], s, 0.0)
        reads_teacher = counted if want_stats else kd_w != 0
        q = None if q is None else torch.where(reads_teacher[:, None], q, 0.0)
        done = _distill_rows(
            s, q, t[flat], kd_w, ce_w, None if flat_labels is None else flat_labels[flat],
            None if labelled is None else labelled[flat] & counted, label_smoothing, divergence, divergence_args,
            standardize, softcap, (student_grad is not None, want_teacher_grad, want_stats),
        )  # fmt: skip
        losses[flat] = done.loss
        for side, grad in zip(sides, (done.student, done.teacher), strict=True):
            if side is not None and grad is not None:
                side.put(index, flat, grad)
        if done.stats is not None:
            stats[flat] = torch.where(counted[:, None], done.stats, 0.0).to(compute)

    loss = (losses.reshape(leading) if reduction == "none" else losses.sum()).to(compute)
    none = torch.ones(0, dtype=torch.float32, device=student.device)
    scales = [none if side is None else side.scale for side in sides]
    return loss, scales[0], teacher_grad, scales[1], stats


def _distill_reference(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *options, want_grad = args
    grad = student.new_empty(student.shape if want_grad else 0)
    loss, scale, *rest = _reference(student, teacher, grad if want_grad else None, *options)
    return loss, grad, scale, *rest


def _distill_reference_(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _reference(student, teacher, student, *args)


# ------------------------------------------------------------------------------------------------- fakes
def _fake(student: Tensor, teacher: Tensor, want_grad: bool, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    reduction, want_teacher_grad, want_stats = args[11], args[-2], args[-1]
    rows = student.shape[:-1].numel()
    compute = compute_dtype(student, teacher)
    half = [
        want_grad and student.dtype == torch.float16,
        want_teacher_grad and teacher.dtype == torch.float16,
    ]
    return (
        student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=compute),
        student.new_empty(rows if half[0] else 0, dtype=torch.float32),
        teacher.new_empty(teacher.shape if want_teacher_grad else 0),
        student.new_empty(rows if half[1] else 0, dtype=torch.float32),
        student.new_empty((rows if want_stats else 0, len(STATS)), dtype=compute),
    )


def _distill_fake(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *options, want_grad = args
    loss, *rest = _fake(student, teacher, want_grad, tuple(options))
    return loss, student.new_empty(student.shape if want_grad else 0), *rest


distill_op = define(
    "distill",
    f"(Tensor student, Tensor teacher, {ROW_OPTIONS}, {_OPTIONS}, bool want_grad)"
    " -> (Tensor loss, Tensor grad, Tensor grad_scale, Tensor teacher_grad, Tensor teacher_grad_scale, Tensor stats)",
    _distill_reference,
    _distill_fake,
)
distill_inplace_op = define(
    "distill_",
    f"(Tensor(a!) student, Tensor teacher, {ROW_OPTIONS}, {_OPTIONS})"
    " -> (Tensor loss, Tensor grad_scale, Tensor teacher_grad, Tensor teacher_grad_scale, Tensor stats)",
    _distill_reference_,
    lambda student, teacher, *args: _fake(student, teacher, True, args),
    mutates=[0],
)


# ---------------------------------------------------------------------------------------------- autograd
class DistillFunction(torch.autograd.Function):
    """``loss, stats = DistillFunction.apply(student, teacher, options)``, options up to ``softcap``, ``want_stats``.

    Either side may require a gradient.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple[Any, ...]) -> Any:  # noqa: D102
        *options_of_rows, want_stats = options
        want_s, want_t = ctx.needs_input_grad[:2]
        loss, grad, scale, teacher_grad, teacher_scale, stats = distill_op(
            student, teacher, *options_of_rows, want_t, want_stats, want_s
        )
        ctx.save_for_backward(grad, scale, teacher_grad, teacher_scale)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> Any:  # noqa: D102
        refuse_double_backward()
        if upstream is None:
            return None, None, None
        grad, scale, teacher_grad, teacher_scale = ctx.saved_tensors
        want_s, want_t = ctx.needs_input_grad[:2]
        return (
            apply_upstream(grad, upstream, scale) if want_s else None,
            apply_upstream(teacher_grad, upstream, teacher_scale) if want_t else None,
            None,
        )


def run_inplace(options: tuple[Any, ...]) -> Any:
    """The ``run`` of KDInplaceFunction for ``distill_`` with these options, as DistillFunction takes them."""
    *options_of_rows, want_stats = options
    return lambda student, teacher, want_t: distill_inplace_op(
        student, teacher, *options_of_rows, want_t, want_stats
    )
