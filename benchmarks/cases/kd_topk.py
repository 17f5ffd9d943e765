"""The cases of distillation from the teacher's k largest outputs, beside `kd_loss` on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, oracle
from benchmarks.cases import kd_problem
from benchmarks.cases.common import COMPILED, NAIVE, OURS, Spec, compiled, make
from benchmarks.oracle import Distillation
from benchmarks.timing import Case, Provider, Roofline
from fasttransfer import kd_loss, topk_kd_loss

ALL_COLUMNS = "kd_loss, all columns"
TAILS = {OURS: "zero", f"{OURS}, renormalize": "renormalize", f"{OURS}, bucket": "bucket"}


class Problem(kd_problem.Problem):
    """As of kd, at T = 1: of the teacher there are k log-probabilities and their columns."""

    def __init__(self, rows: int, vocab: int, k: int, dtype: str) -> None:
        super().__init__(rows, vocab, dtype)
        top = self.teacher.float().log_softmax(-1).topk(k)
        self.values, self.indices = top.values, top.indices
        # Read the student, write the gradient; the k of the teacher are not worth counting.
        self.floor_bytes = 2 * self.numbers * self.student.element_size()
        self.all_columns = Distillation(self.student, self.teacher, None, 1.0, 0.0)
        self.answers: dict[str, list[Tensor]] = {}

    def topk(self, tail: str) -> kd_problem.Loss:
        """topk_kd_loss."""
        options: dict[str, Any] = {"teacher_form": "log_probs", "tail": tail}
        return lambda leaf: topk_kd_loss(leaf, self.values, self.indices, **options)

    def by_hand(self, function: Callable[..., Any]) -> kd_problem.Loss:
        """The naive code, whose tail is "zero"."""
        return lambda leaf: function(leaf, self.values, self.indices)

    def everybody(self, spec: Spec, kinds: frozenset[str]) -> Case:
        """The naive code, ours with each tail, and ours with the whole teacher."""
        providers: list[Provider] = []
        if "naive" in kinds:
            providers.append(self.provider(NAIVE, self.by_hand(naive.topk_kd)))
        if "compile" in kinds:
            providers.append(self.provider(COMPILED, self.by_hand(compiled(naive.topk_kd))))
        providers.append(self.provider(ALL_COLUMNS, lambda leaf: kd_loss(leaf, self.teacher), ours=True))
        providers += [self.provider(name, self.topk(tail), ours=True) for name, tail in TAILS.items()]
        return replace(self.case(spec, providers), error=self.error_of)

    def error_of(self, name: str, outputs: Sequence[Tensor]) -> float:
        """Of the loss and the gradient of that provider's own formula."""
        if name == ALL_COLUMNS:
            return self.all_columns.error(outputs)
        tail = TAILS.get(name, "zero")
        if tail not in self.answers:
            self.answers[tail] = oracle.topk_kd(self.student, self.values, self.indices, tail)
        return oracle.relative_error(outputs, self.answers[tail])

    def roofline(self, suffix: str = "", given: bool = False, **more: Any) -> Roofline:
        """`torch.neg(a)`: a read and a write per element."""
        a = self.student
        call = Provider(
            "torch.neg(a)" + suffix, lambda _: torch.neg(a), lambda: None, lambda _, out: [out], **more
        )
        return Roofline(call, self.floor_bytes)


def topk(rows: int, vocab: int, k: int, dtype: str, tags: str) -> Spec:
    """One size in one dtype."""
    title = f"kd topk {k} {rows}x{vocab} {dtype.replace('fp32', '')}".strip()
    return make(
        "kd", title, partial(Problem, rows, vocab, k, dtype), Problem.everybody, tags,
        group="topk", dtype=dtype, rows=rows, vocab=vocab,
    )  # fmt: skip


def topk_specs() -> list[Spec]:
    """All cases."""
    return [
        topk(256, 32000, 64, "fp32", "compile quick"),
        topk(256, 32000, 64, "bf16", "compile"),
        topk(64, 128256, 64, "fp32", ""),
    ]
