"""``torch.ops.fasttransfer.linear_kd``: the distillation loss of hidden states and heads, a chunk of rows at a time.

Per chunk of C rows, in two buffers [C, V] that all chunks share::

    S = H_s W_s^T + b_s        T = H_t W_t^T + b_t        two products
    S <- d loss / d S                                     the in-place op of logits
    dH = S W_s                 dW += S^T H_s              two products;  db += sum of S over rows

The same four products as with whole logits, and nothing of [rows, V]. In float16 each row of S carries a power of two
(see ``half_scale``), which leaves with the rows of dH, and enters dW with the rows of H_s, relative to the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer.ops.distill import STATS, distill_inplace_op, distill_op
from fasttransfer.ops.kd import ROW_OPTIONS, apply_upstream, kd_inplace_op, kd_op, refuse_double_backward
from fasttransfer.ops.library import accumulator, compute_dtype, define

# Both chunks of logits together take at most this, or as much as the student's head if that is more: what is there
# anyway may be there once more. H/2 rows at equal dtypes, so that reading W and dW once per chunk stays cheap.
_WORKSPACE = 32 << 20
# Rows of dW that are made at a time where its products need a temporary.
_BLOCK = 4096
_HALVES = (torch.float16, torch.bfloat16)


class _Side(NamedTuple):
    """Where logits come from, without the columns that do not count."""

    hidden: Tensor  # [rows, H]
    head: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, bias: Tensor | None, columns: int) -> _Side:
        """From ``[..., H]``, ``[V or more, H]`` and ``[V or more]``."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return cls(rows, head[:columns], None if bias is None else bias[:columns])

    def logits(self, part: Any, out: Tensor) -> Tensor:
        """Of these rows, into ``out``."""
        rows, head = self.hidden[part], self.head.t()
        if self.bias is None:
            return torch.mm(rows, head, out=out)
        return torch.addmm(self.bias, rows, head, out=out)


class _Options(NamedTuple):
    """What the ops of logits are given, for all rows."""

    labels: Tensor | None
    row_weight: Tensor | None
    row_temperature: Tensor | None
    num_items: Tensor | None
    num_items_constant: list[float]
    temperature: float
    label_weight: float
    label_smoothing: float
    ignore_index: int
    distill_ignored: bool
    vocab_size: int
    reduction: str
    scale_by_t2: bool
    divergence: str
    divergence_args: list[float]
    standardize: bool
    softcap: list[float]
    want_stats: bool

    @property
    def plain(self) -> bool:
        """Whether ``kd`` computes it; else ``distill``."""
        return self[13:] == ("forward_kl", [], False, [0.0, 0.0], False)

    def flat(self) -> _Options:
        """With values per row as ``[rows]``."""
        return self._each(lambda values: values.reshape(-1))

    def at(self, part: Any) -> _Options:
        """Of these rows."""
        return self._each(lambda values: values[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Options:
        given = dict(zip(self._fields[:3], self[:3], strict=True))
        changed: dict[str, Any] = {name: change(x) for name, x in given.items() if x is not None}
        return self._replace(**changed)

    def counted(self) -> Tensor | None:
        """Which rows are read; None: all."""
        counted = None if self.row_weight is None else self.row_weight != 0
        if self.labels is not None and not self.distill_ignored:
            has_label = self.labels != self.ignore_index
            counted = has_label if counted is None else counted & has_label
        return counted

    def over_all_rows(self, rows: int, first_dimension: int, like: Tensor) -> _Options:
        """With the divisors of all rows in place of each chunk's own. Nothing waits for the device."""
        if self.reduction in ("sum", "none") or self.num_items is not None or self.num_items_constant:
            return self
        if self.reduction == "batchmean" or (self.labels is None and self.row_weight is None):
            divisor = first_dimension if self.reduction == "batchmean" else rows
            return self._replace(num_items_constant=[float(divisor)])
        acc = accumulator(like)
        weight = torch.ones(rows, dtype=acc, device=like.device)
        weight = weight if self.row_weight is None else self.row_weight.to(acc)
        if self.labels is None:
            return self._replace(num_items=weight.sum().reshape(1))
        labelled = torch.where(self.labels != self.ignore_index, weight, 0.0).sum()
        distilled = weight.sum() if self.distill_ignored else labelled
        return self._replace(num_items=torch.stack([distilled, labelled]))


def _loss_and_grad_(
    student: Tensor, teacher: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, factors of the rows of the gradient (float16, else empty), statistics; the student's logits become it."""
    if options.plain:
        return *kd_inplace_op(student, teacher, *options[:13]), None
    loss, scale, *_, stats = distill_inplace_op(student, teacher, *options[:-1], False, options.want_stats)
    return loss, scale, stats


def _loss(student: Tensor, teacher: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
    if options.plain:
        return kd_op(student, teacher, *options[:13], False)[0], None
    loss, *_, stats = distill_op(student, teacher, *options[:-1], False, options.want_stats, False)
    return loss, stats


# ---------------------------------------------------------------------------------------------- products
def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, of operands in 16 bits."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


class _HeadGrad:
    """dW [V, H], summed over chunks."""

    def __init__(self, head: Tensor, columns: int, sum_in: torch.dtype) -> None:
        self.whole = head.new_empty(head.shape, dtype=sum_in)
        self.whole[columns:].zero_()
        self.sum = self.whole[:columns]
        self.direct = sum_in == head.dtype  # the product is added where it is made
        self.empty = True

    def add(self, g: Tensor, rows: Tensor, scale: Tensor | None) -> None:
        """``sum += (scale g)^T rows`` of a chunk: g [C, V], rows [C, H], scale [C]."""
        if self.direct:
            if self.empty:
                torch.mm(g.t(), rows, out=self.sum)
            else:
                torch.addmm(self.sum, g.t(), rows, out=self.sum)
            self.empty = False
            return
        self.begin()
        top: Any = 1.0
        if scale is not None:
            # A power of two per row: relative to the largest nothing overflows, and what underflows is negligible.
            top = scale.amax().clamp_min(2.0**-126)  # not 0 where no row is counted
            rows = (rows * (scale / top)[:, None]).to(rows.dtype)
        for first in range(0, g.shape[1], _BLOCK):
            into = self.sum[first : first + _BLOCK]
            block = g[:, first : first + _BLOCK].t()
            if g.dtype in _HALVES:
                into.add_(_wide_product(block, rows).mul_(top))
            else:
                into.add_(torch.mm(block, rows))

    def begin(self) -> None:
        """Zeros, where nothing was written yet."""
        if self.empty:
            self.sum.zero_()
        self.empty = False


class _Gradients:
    """Of the student's hidden states, head and bias; those whose dtype is None are not wanted."""

    def __init__(
        self,
        student: _Side,
        whole: tuple[Tensor, Tensor, Tensor | None],
        dtypes: Sequence[torch.dtype | None],
        sum_in: torch.dtype | None,
        one_chunk: bool,
    ) -> None:
        self.student, self.shape, self.dtypes = student, whole[0].shape, dtypes
        columns, product = student.head.shape[0], student.head.dtype
        hidden_dtype, head_dtype, bias_dtype = dtypes
        # Rows that are not counted may never be written.
        self.hidden = None if hidden_dtype is None else torch.zeros_like(student.hidden, dtype=hidden_dtype)
        self.head = self.bias = None
        if head_dtype is not None:
            self.head = _HeadGrad(whole[1], columns, _sum_dtype(head_dtype, sum_in, product, one_chunk))
        if bias_dtype is not None and whole[2] is not None:
            self.bias = torch.zeros_like(whole[2], dtype=_sum_dtype(bias_dtype, sum_in, product, False))

    def add(self, part: Any, g: Tensor, factors: Tensor, counted: Tensor | None) -> None:
        """A chunk: ``g`` [n, V] times ``factors`` [n] (or none of them) is the gradient of its logits."""
        scale = None
        if factors.numel():  # the factor of a row that is not counted says nothing
            scale = factors if counted is None else torch.where(counted, factors, 0.0)
        if self.hidden is not None:
            if isinstance(part, slice) and scale is None and self.hidden.dtype == g.dtype:
                torch.mm(g, self.student.head, out=self.hidden[part])
            else:
                self.hidden[part] = _hidden_grad(g, self.student.head, scale).to(self.hidden.dtype)
        if self.head is not None:
            rows = self.student.hidden[part]
            if counted is not None:  # 0 * NaN of a row that is not to be read
                rows = torch.where(counted[:, None], rows, 0.0)
            self.head.add(g, rows, scale)
        if self.bias is not None:
            _add_bias_grad(self.bias[: g.shape[1]], g, scale)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """In their dtypes; empty where not wanted."""
        none = self.student.hidden.new_empty
        if self.head is not None:
            self.head.begin()
        _, head, bias = self.dtypes
        return (
            none(0) if self.hidden is None else self.hidden.reshape(self.shape),
            none(0) if self.head is None else self.head.whole.to(head),
            none(0) if self.bias is None else self.bias.to(bias),
        )


def _hidden_grad(g: Tensor, head: Tensor, scale: Tensor | None) -> Tensor:
    """``scale g W`` [C, H]: in float32 where there is a scale."""
    if scale is None:
        return torch.mm(g, head)
    total = g.new_zeros((len(g), head.shape[1]), dtype=torch.float32)
    step = g.shape[1] if g.device.type == "cuda" else _BLOCK
    for first in range(0, g.shape[1], step):
        total += _wide_product(g[:, first : first + step], head[first : first + step])
    return total.mul_(scale[:, None])


def _add_bias_grad(total: Tensor, g: Tensor, scale: Tensor | None) -> None:
    """``total += sum of scale g over rows`` [V]."""
    if scale is None:
        total += g.sum(0, dtype=total.dtype)
        return
    for first in range(0, g.shape[1], _BLOCK):
        block = g[:, first : first + _BLOCK].to(total.dtype)
        total[first : first + _BLOCK] += block.mul_(scale[:, None]).sum(0)


# ------------------------------------------------------------------------------------------------ chunks
def may_look(t: Tensor) -> bool:
    """Whether looking at values waits for nothing."""
    return t.device.type == "cpu"


def _rows_per_chunk(rows: int, student: _Side, teacher: _Side) -> int:
    """As many as the workspace holds, and the chunks of about equal size."""
    sizes = [side.hidden.element_size() for side in (student, teacher)]
    workspace = max(_WORKSPACE, student.head.numel() * sizes[0])
    most = max(1, workspace // (len(student.head) * sum(sizes)))
    even = -(-rows // max(1, -(-rows // most)))
    return min(most, -(-even // 16) * 16)


def _linear_kd(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Below autograd nothing is recorded, but `out=` asks; and operands are in the dtype that they are to be in.
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        return _chunked(
            (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias), *args
        )


def _chunked(
    student_side: tuple[Tensor, Tensor, Tensor | None],
    teacher_side: tuple[Tensor, Tensor, Tensor | None],
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *row_options, chunk_rows, sum_in, hidden_dtype, head_dtype, bias_dtype = args
    options = _Options(*row_options)
    s, t = (_Side.of(*side, options.vocab_size) for side in (student_side, teacher_side))
    leading = student_side[0].shape[:-1]
    rows = leading.numel()
    options = options.flat().over_all_rows(rows, leading[0] if leading else 1, s.hidden)

    # Rows that are not counted cost nothing where one may look which they are.
    counted = options.counted()
    chosen = None
    if counted is not None and may_look(s.hidden) and not bool(counted.all()):
        chosen = counted.nonzero()[:, 0]
    total = rows if chosen is None else len(chosen)
    step = max(1, min(chunk_rows or _rows_per_chunk(total, s, t), total))

    want_grad = any(dtype is not None for dtype in (hidden_dtype, head_dtype, bias_dtype))
    grads = _Gradients(s, student_side, (hidden_dtype, head_dtype, bias_dtype), sum_in, total <= step)
    each = options.reduction == "none"
    compute = compute_dtype(s.hidden, t.hidden)
    losses = s.hidden.new_zeros(rows if each else (), dtype=compute if each else accumulator(s.hidden))
    stats = s.hidden.new_zeros((rows if options.want_stats else 0, len(STATS)), dtype=compute)
    parts: list[Any] = [slice(first, min(first + step, total)) for first in range(0, total, step)]
    if chosen is not None:
        parts = [chosen[part] for part in parts]
    _run_chunks(parts, step, s, t, options, losses, stats, grads if want_grad else None)
    return losses.reshape(leading) if each else losses.to(compute), *grads.finish(), stats


def _run_chunks(
    parts: list[Any],  # slices or indices of rows
    step: int,  # the most rows of one
    s: _Side,
    t: _Side,
    options: _Options,
    losses: Tensor,
    stats: Tensor,
    grads: _Gradients | None,
) -> None:
    """Fill ``losses``, ``stats`` and ``grads``. The workspace lives here, and is freed before sums are rounded."""
    student, teacher = (side.hidden.new_empty((step, options.vocab_size)) for side in (s, t))
    for part in parts:
        n = part.stop - part.start if isinstance(part, slice) else len(part)
        mine = options.at(part)
        z, q = s.logits(part, student[:n]), t.logits(part, teacher[:n])
        if grads is None:
            loss, chunk_stats = _loss(z, q, mine)
        else:
            loss, scale, chunk_stats = _loss_and_grad_(z, q, mine)
            grads.add(part, z, scale, mine.counted())
        if losses.dim():
            losses[part] = loss
        else:
            losses += loss
        if options.want_stats and chunk_stats is not None:
            stats[part] = chunk_stats


def _sum_dtype(
    grad: torch.dtype, asked: torch.dtype | None, product: torch.dtype, one_chunk: bool
) -> torch.dtype:
    """What a gradient is summed in over chunks: by default one rounding at the end, as if it had been one product."""
    if product == torch.float16:
        return torch.float64 if asked == torch.float64 else torch.float32
    if one_chunk:
        return grad
    return asked or (torch.float32 if grad in _HALVES else grad)


def _fake(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction, want_stats = args[11], args[17]
    leading = student_hidden.shape[:-1]
    compute = compute_dtype(student_hidden, teacher_hidden)
    loss = student_hidden.new_empty(leading if reduction == "none" else (), dtype=compute)

    def grad(of: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        if of is None or dtype is None:
            return student_hidden.new_empty(0)
        return of.new_empty(of.shape, dtype=dtype)

    return (
        loss,
        grad(student_hidden, args[-3]),
        grad(student_head, args[-2]),
        grad(student_bias, args[-1]),
        loss.new_empty((leading.numel() if want_stats else 0, len(STATS))),
    )


linear_kd_op = define(
    "linear_kd",
    "(Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor teacher_hidden, Tensor teacher_head, "
    f"Tensor? teacher_bias, {ROW_OPTIONS}, str divergence, float[] divergence_args, bool standardize, float[] softcap, "
    "bool want_stats, int chunk_rows, ScalarType? sum_in, ScalarType? hidden_grad, ScalarType? head_grad, "
    "ScalarType? bias_grad) -> (Tensor loss, Tensor hidden_grad, Tensor head_grad, Tensor bias_grad, Tensor stats)",
    _linear_kd,
    _fake,
)


# ---------------------------------------------------------------------------------------------- autograd
class Call(NamedTuple):
    """What a call of ``linear_kd`` is given beside the six tensors."""

    options: tuple[Any, ...]  # up to want_stats
    chunk_rows: int  # 0: chosen
    sum_in: torch.dtype | None
    product: torch.dtype | None  # autocast's; None: the operands' own


def run(sides: Sequence[Tensor | None], call: Call, grads: Sequence[torch.dtype | None]) -> Any:
    """The op, its operands cast as ``F.linear`` would cast them."""
    if call.product is not None:
        sides = [x if x is None or x.dtype == torch.float64 else x.to(call.product) for x in sides]
    return linear_kd_op(*sides, *call.options, call.chunk_rows, call.sum_in, *grads)


def _kept_in(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits for the upstream one in: in float16 it would underflow before the loss scale comes."""
    return torch.float32 if dtype == torch.float16 else dtype


class LinearKDFunction(torch.autograd.Function):
    """``loss, stats = LinearKDFunction.apply(call, *student's and teacher's hidden, head, bias)``.

    With a loss per row the gradients of head and bias are sums weighed by the upstream gradient, so they are computed
    in backward, from the logits of a second pass.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *sides: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        wanted = [
            x is not None and need for x, need in zip(sides[:3], ctx.needs_input_grad[1:4], strict=True)
        ]
        dtypes = [
            _kept_in(x.dtype) if x is not None and want else None
            for x, want in zip(sides[:3], wanted, strict=True)
        ]
        ctx.again = call.options[11] == "none" and any(wanted[1:])
        loss, *grads, stats = run(sides, call, [None] * 3 if ctx.again else dtypes)
        ctx.wanted = wanted
        ctx.dtypes = [None if x is None else x.dtype for x in sides[:3]]
        ctx.set_materialize_grads(False)
        if ctx.again:
            ctx.call = call._replace(options=(None, None, None, None, *call.options[4:]))
            ctx.save_for_backward(*sides, *call.options[:4])
        else:
            ctx.save_for_backward(*grads)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> Any:  # noqa: D102
        refuse_double_backward("linear_kd_loss")
        if upstream is None:
            return (None,) * 7
        if ctx.again:
            grads = _second_pass(ctx, upstream)
        else:
            grads = [
                _times_upstream(grad, upstream, dtype) if want else None
                for grad, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
            ]
        return (None, *grads, None, None, None)


def _times_upstream(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    if grad.dtype == dtype:
        return apply_upstream(grad, upstream, grad.new_empty(0, dtype=torch.float32))
    return (grad * (upstream[..., None] if upstream.dim() else upstream)).to(dtype)


def _second_pass(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients of ``sum(upstream * losses)``: the upstream gradient is a weight of the rows."""
    *sides, labels, row_weight, row_temperature, num_items = ctx.saved_tensors
    weight = upstream.detach() if row_weight is None else upstream.detach() * row_weight
    options = list(ctx.call.options)
    options[:4] = labels, weight, row_temperature, num_items
    options[11], options[17] = "sum", False
    dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, ctx.wanted, strict=True)]
    # The upstream gradient is in it already, with the loss scale: float16 needs nothing wider to wait in.
    _, *grads, _ = run(sides, ctx.call._replace(options=tuple(options)), dtypes)
    return [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
