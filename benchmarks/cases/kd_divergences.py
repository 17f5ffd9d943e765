"""The cases of the other divergences of `kd_loss`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks import naive
from benchmarks.cases import kd_problem
from benchmarks.cases.common import Spec, make
from benchmarks.oracle import Divergence
from benchmarks.timing import Provider
from fasttransfer import kd_loss

NAIVE_OF: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": naive.reverse_kl,
    "jsd": naive.jsd,
    "tvd": naive.tvd,
}


class Problem(kd_problem.Problem):
    """As of kd, at T = 1, with another divergence."""

    def __init__(self, rows: int, vocab: int, dtype: str, divergence: str) -> None:
        super().__init__(rows, vocab, dtype)
        self.naive, self.divergence = NAIVE_OF[divergence], divergence
        self.exact = Divergence(self.student, self.teacher, divergence)

    def by_hand(self, function: Callable[..., Any]) -> kd_problem.Loss:
        """The naive code."""
        return lambda leaf: function(leaf, self.teacher)

    def ours(self, **options: Any) -> kd_problem.Loss:
        """kd_loss."""
        return lambda leaf: kd_loss(leaf, self.teacher, divergence=self.divergence, **options)

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """The libraries that kd is raced with have no other divergence."""
        return []


def divergence(rows: int, vocab: int, dtype: str, name: str, tags: str) -> Spec:
    """One divergence at one size."""
    title = f"kd {name} {rows}x{vocab} {dtype.replace('fp32', '')}".strip()
    return make(
        "kd", title, partial(Problem, rows, vocab, dtype, name), Problem.everybody, tags,
        group="divergence", dtype=dtype, rows=rows, vocab=vocab,
    )  # fmt: skip


def divergence_specs() -> list[Spec]:
    """All cases."""
    listed = [divergence(256, 32000, "fp32", name, "compile quick") for name in NAIVE_OF]
    listed += [divergence(256, 32000, "bf16", name, "compile") for name in NAIVE_OF]
    listed += [divergence(64, 128256, "fp32", name, "") for name in NAIVE_OF]
    listed += [divergence(1024, 1000, "fp32", name, "") for name in NAIVE_OF]
    return listed
