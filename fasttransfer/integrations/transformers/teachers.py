"""Three ways of knowing the teacher: its logits, its hidden states and head, its k largest outputs on disk.

Each is called with the student and a batch, and gives the loss and the student's outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checks import shape
from fasttransfer.integrations.transformers.heads import (
    check_logits,
    hidden_of,
    linear_head,
    logits_of,
    once,
    replaced,
)
from fasttransfer.integrations.transformers.rows import Rows
from fasttransfer.kd import KDLoss
from fasttransfer.kd_arguments import Options
from fasttransfer.linear_kd import LinearKDLoss
from fasttransfer.teacher_cache import TeacherCache
from fasttransfer.topk_kd import TopKKDLoss

# Of the loss modules, what a Trainer decides: it adds up means over accumulated batches.
_NOT_OPTIONS = ("self", "reduction", "return_stats", "group")


class Batch(NamedTuple):
    """One batch, on the device."""

    inputs: dict[str, Any]  # without labels
    rows: Rows
    items: Tensor | None  # the divisor; None: the rows of this batch
    numbers: Any  # of the rows in a cache


def make_loss(kind: Any, options: Mapping[str, Any], *without: str) -> Any:
    """``kind(**options)``.

    Raises:
        TypeError, ValueError: An option that it does not have or that is not the caller's; as ``kind``.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"distillation must be a dict of options of the loss, got {type(options).__name__}")
    accepted = [n for n in inspect.signature(kind.__init__).parameters if n not in (*_NOT_OPTIONS, *without)]
    for name in options:
        if name not in accepted:
            raise ValueError(f"distillation: {name!r} is not one of its options here: {', '.join(accepted)}")
    return kind(**options)


def accepted(model: nn.Module) -> tuple[frozenset[str], bool]:
    """The names that ``forward`` takes, and whether it takes any other."""
    inner = base_model(model)
    found = inspect.signature(inner.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        frozenset(p.name for p in found if p.kind in named),
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found),
    )


def base_model(model: nn.Module) -> Any:
    """The model inside of PEFT's, whose forward takes anything."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def own_inputs(inputs: Mapping[str, Any], model: nn.Module, other: nn.Module | None) -> dict[str, Any]:
    """What ``model`` takes of a batch: of names that neither lists, all if it takes any.

    A wrapper that lists none takes all.
    """
    names, open_ended = accepted(model)
    others = accepted(other)[0] if other is not None and names else frozenset()
    return {
        name: value for name, value in inputs.items() if name in names or (open_ended and name not in others)
    }


class _Model:
    """A teacher that is run beside the student."""

    def __init__(self, teacher: nn.Module) -> None:
        self.model = teacher

    def student_inputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student takes of a batch."""
        return own_inputs(inputs, student, self.model)

    def runs(self, student: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
        """The teacher's forward of a batch: in eval mode, without a graph, without a cache of keys and values."""
        if self.model.training:
            self.model.eval()
        own = own_inputs(inputs, self.model, student)
        if "use_cache" in accepted(self.model)[0]:
            own["use_cache"] = False

        def run() -> Any:
            with torch.no_grad():
                return self.model(**own)

        return run


class LogitsTeacher(_Model):
    """``kd_loss`` of both models' logits."""

    def __init__(self, teacher: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(teacher)
        self.loss = make_loss(KDLoss, options)

    @property
    def options(self) -> Options:
        """Of the loss."""
        return self.loss.options

    def __call__(
        self, model: nn.Module, student: nn.Module, batch: Batch, autocast: Any, *, whole: bool
    ) -> tuple[Tensor, Any]:
        """The loss, and the student's outputs."""
        with autocast():
            outputs = self.runs(student, batch.inputs)()
        teacher = logits_of(outputs)
        outputs = model(**self.student_inputs(student, batch.inputs))
        logits = logits_of(outputs)
        check_rows(logits, batch.rows)
        loss = self.loss(
            logits,
            teacher.to(logits.device),
            batch.rows.labels,
            row_weight=batch.rows.weight,
            num_items=batch.items,
        )
        return loss, outputs


class HiddenTeacher(_Model):
    """``linear_kd_loss`` in the place of the student's head: inside of its forward, as DDP and autocast expect it."""

    def __init__(self, teacher: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(teacher)
        self.loss = make_loss(LinearKDLoss, options)
        own = ("chunk_rows", "accum_dtype")
        self.whole = LogitsTeacher(teacher, {n: value for n, value in options.items() if n not in own})
        linear_head("teacher", teacher)
        self.checked: Any = None

    @property
    def options(self) -> Options:
        """Of the loss."""
        return self.loss.options

    def __call__(
        self, model: nn.Module, student: nn.Module, batch: Batch, autocast: Any, *, whole: bool
    ) -> tuple[Tensor, Any]:
        """The loss, and the student's outputs: with logits if ``whole``."""
        if whole:  # somebody wants to see logits
            return self.whole(model, student, batch, autocast, whole=True)
        head, teacher_head = linear_head("student", student), linear_head("teacher", self.model)
        if self.checked is not student:
            self._check(student, head, teacher_head, batch, autocast)
        with autocast():
            hidden = hidden_of(teacher_head, self.runs(student, batch.inputs))
        bias = teacher_head.bias
        losses: list[Tensor] = []

        def loss_of(student_hidden: Tensor) -> Tensor:
            check_rows(student_hidden, batch.rows)
            loss = self.loss(
                student_hidden, head.weight, hidden.to(student_hidden.device), teacher_head.weight.detach(),
                batch.rows.labels, student_bias=head.bias, teacher_bias=None if bias is None else bias.detach(),
                row_weight=batch.rows.weight, num_items=batch.items,
            )  # fmt: skip
            losses.append(loss)
            return loss.reshape([1] * student_hidden.dim())

        with replaced(head, loss_of):
            outputs = model(**self.student_inputs(student, batch.inputs))
        return once(losses), outputs

    def _check(
        self, student: nn.Module, head: nn.Linear, teacher_head: nn.Linear, batch: Batch, autocast: Any
    ) -> None:
        """Once, with the first example: logits are what the heads give."""
        size = len(next(t for t in batch.inputs.values() if isinstance(t, Tensor) and t.dim()))
        first = {
            name: value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.inputs.items()
        }
        caps = self.options.softcap
        own = self.student_inputs(student, first)
        with autocast():
            check_logits("student", student, head, lambda: student(**own), caps[0])
            check_logits("teacher", self.model, teacher_head, self.runs(student, first), caps[1])
        self.checked = student


class CachedTeacher:
    """``topk_kd_loss`` with the rows of a ``TeacherCache``."""

    def __init__(self, cache: TeacherCache, options: Mapping[str, Any], column: str) -> None:
        self.cache, self.column = cache, column
        self.loss = make_loss(TopKKDLoss, {"teacher_form": "log_probs", **options})

    @property
    def options(self) -> Options:
        """Of the loss."""
        return self.loss.options

    def student_inputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student takes of a batch."""
        return own_inputs({n: value for n, value in inputs.items() if n != self.column}, student, None)

    def __call__(
        self, model: nn.Module, student: nn.Module, batch: Batch, autocast: Any, *, whole: bool
    ) -> tuple[Tensor, Any]:
        """The loss, and the student's outputs."""
        if batch.numbers is None:
            raise ValueError(
                f"the batch has no column {self.column!r}: the number of each example's first row in the teacher's "
                "cache, or of each of its tokens"
            )
        outputs = model(**self.student_inputs(student, batch.inputs))
        logits = logits_of(outputs)
        check_rows(logits, batch.rows)
        width = logits.shape[-1]
        if self.options.vocab_size is None and width != self.cache.vocab_size:
            raise ValueError(
                f"the student has {width} columns, the cache is of {self.cache.vocab_size}: pass vocab_size in "
                "distillation, the number of columns that count on both sides"
            )
        values, indices = self._rows(logits.shape[:-1], batch)
        loss = self.loss(
            logits,
            values.to(logits.device),
            indices.to(logits.device),
            batch.rows.labels,
            row_weight=batch.rows.weight,
            num_items=batch.items,
        )
        return loss, outputs

    def _rows(self, rows: torch.Size, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is cached of the rows that are read; no entry in the others."""
        numbers = row_numbers(batch.numbers, rows, batch.rows.mask, self.column)
        read = batch.rows.read(self.options)
        wanted = torch.ones(rows, dtype=torch.bool) if read is None else read.cpu()
        picked = numbers[wanted]
        if picked.numel() and int(picked.min()) < 0:
            raise ValueError(f"column {self.column!r} has no row of the cache for a row that counts")
        if picked.numel() and int(picked.max()) >= len(self.cache):
            raise ValueError(
                f"column {self.column!r} leads to row {int(picked.max())} of a cache of {len(self.cache)} rows: is it "
                "the cache of these examples?"
            )
        values = torch.full((*rows, self.cache.k), float("-inf"), dtype=self.cache.dtype)
        indices = torch.full((*rows, self.cache.k), -1, dtype=torch.int64)
        values[wanted], indices[wanted] = self.cache[picked]
        return values, indices


def row_numbers(numbers: Any, rows: torch.Size, mask: Tensor | None, column: str) -> Tensor:
    """The number in the cache of every row, -1 for padding.

    Args:
        numbers: One per row, or, for tokens ``[B, T]``, of the first token of each example ``[B]``; those of the
            others follow, padding (on either side) not counted.
        rows: The leading dimensions of the logits.
        mask: Which tokens are no padding, or None.
        column: Whose numbers they are.
    """
    if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"column {column!r} must be integers, got {getattr(numbers, 'dtype', type(numbers))}"
        )
    numbers = numbers.cpu().to(torch.int64)
    if numbers.shape == rows:
        return numbers
    if len(rows) != 2 or numbers.shape != rows[:1]:
        raise ValueError(f"column {column!r} must be {list(rows)} or {list(rows[:1])}, got {shape(numbers)}")
    if mask is None or mask.shape != rows:
        return numbers[:, None] + torch.arange(rows[1])
    present = mask.cpu() != 0
    return torch.where(present, numbers[:, None] + present.cumsum(-1) - 1, -1)


def check_rows(logits: Tensor, rows: Rows) -> None:
    """Raise ValueError where a batch without labels does not say which rows count."""
    if rows.labels is None and logits.shape[:-1].numel() != rows.number:
        raise ValueError(
            f"a batch without labels was counted as {rows.number} rows, and the logits have "
            f"{logits.shape[:-1].numel()}: give it labels, with -100 in rows that do not count (label_weight=0.0 takes "
            "nothing else of them)"
        )
