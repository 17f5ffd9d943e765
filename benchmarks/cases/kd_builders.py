"""The builders of cases that only distillation has: outputs in given memory, and variants of the plain call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.common import OURS, Spec
from benchmarks.cases.kd_problem import ADD_OUT, Problem, and_backward, leaf_of, loss_and_grad
from benchmarks.oracle import Distillation
from benchmarks.timing import Case, Provider
from fasttransfer import kd_loss


class Given(torch.autograd.Function):
    """Makes logits on given memory that are no leaf and no view, as a model's last layer does."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return torch.empty(0, dtype=box[0].dtype).set_(box[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.box.append(grad)
        return None, None


def new_and_given(problem: Problem, spec: Spec, kinds: frozenset[str]) -> Case:
    """Outputs in new memory, which past 32 MiB the system maps anew at each call, and in given memory."""
    student = problem.student.clone()
    handle = torch.zeros((), requires_grad=True)

    def prepare() -> tuple[list[Tensor], Tensor]:
        box = [student.copy_(problem.student)]  # the last call has overwritten it
        return box, Given.apply(handle, box)

    loss = problem.ours(inplace=True)

    def call(given: tuple[list[Tensor], Tensor]) -> Tensor:
        value = loss(given[1])
        value.backward()
        return value

    inplace = Provider(
        f"{OURS}, inplace=True", call, prepare, lambda given, value: [value.detach(), given[0][1]],
        ours=True, roofline=ADD_OUT,
    )  # fmt: skip
    providers = [*problem.naive_if(kinds), problem.our_own(), inplace]
    return problem.case(spec, providers, [problem.roofline(), problem.roofline(given=True)])


def variants(problem: Problem, spec: Spec, kinds: frozenset[str]) -> Case:
    """Ours only: other temperatures and strided rows against the plain case, which should cost the same.

    The strided leaves are leaves themselves (not slices taken inside the graph), so that what is timed is the
    loss and not torch's backward of slicing.
    """
    student, teacher, rows, vocab = problem.student, problem.teacher, problem.rows, problem.vocab
    groups = 4
    # `whole[:, :-1]` of [groups, rows / groups + 1, vocab]: a gap of one row after every group.
    shape = (groups, rows // groups, vocab)
    shifted_s = torch.zeros(groups, rows // groups + 1, vocab)[:, :-1].copy_(student.view(shape))
    shifted_t = torch.zeros(groups, rows // groups + 1, vocab)[:, :-1].copy_(teacher.view(shape))
    # `padded[:, :vocab]` of [rows, vocab + 64]: a gap after every row.
    padded_s = torch.zeros(rows, vocab + 64)[:, :vocab].copy_(student)
    padded_t = torch.zeros(rows, vocab + 64)[:, :vocab].copy_(teacher)
    given: dict[str, tuple[Tensor, Tensor, float]] = {
        "T=2": (student, teacher, 2.0),
        "T=1": (student, teacher, 1.0),
        "T=3": (student, teacher, 3.0),
        "rows of [:, :-1]": (shifted_s, shifted_t, 2.0),
        "padded columns": (padded_s, padded_t, 2.0),
    }

    def provider(name: str, s: Tensor, t: Tensor, temperature: float) -> Provider:
        call = and_backward(lambda leaf: kd_loss(leaf, t, temperature=temperature))
        return Provider(name, call, lambda: leaf_of(s), loss_and_grad, ours=True)

    exact = {t: Distillation(student, teacher, None, t, 0.0) for t in (1.0, 2.0, 3.0)}
    case = problem.case(spec, [provider(name, *each) for name, each in given.items()])
    return replace(case, error=lambda name, outputs: exact[given[name][2]].error(outputs))
