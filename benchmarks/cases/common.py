"""What the cases of all operations share: their description, the providers' names, tensors, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Case, Provider, Roofline

NAIVE, COMPILED = "naive", "torch.compile"
OURS, REFERENCE = "fasttransfer", "fasttransfer, pure torch"

# Kinds of providers, for `Spec.build`. Ours and the roofline are always there.
KINDS = frozenset({"naive", "compile", "torch", "peers", "reference"})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """A case that has not been built yet: `build` makes its tensors, so that one case is in memory at a time."""

    key: str
    title: str
    operation: str  # the file it is in: kd, l2sp, blend
    builder: Callable[[Spec, frozenset[str]], Case]
    tags: frozenset[str] = frozenset()
    compiled: bool = False  # whether torch.compile is among its providers in a full run: it costs seconds
    about: dict[str, Any] = field(default_factory=dict)  # group, dtype, sizes: what the report sorts by

    def build(self, kinds: frozenset[str]) -> Case:
        """The case with its tensors and with these kinds of providers."""
        return self.builder(self, kinds)


def make(
    operation: str,
    title: str,
    problem: Callable[[], Any],
    builder: Callable[[Any, Spec, frozenset[str]], Case],
    tags: str = "",
    **about: Any,
) -> Spec:
    """A case: `builder(problem(), spec, kinds)` makes it. A tag `compile` races torch.compile in a full run."""
    labels = set(tags.split())

    def build(spec: Spec, kinds: frozenset[str]) -> Case:
        return builder(problem(), spec, kinds)

    return Spec(
        key_of(title), title, operation, build, frozenset(labels - {"compile"}), "compile" in labels, about
    )


def key_of(title: str) -> str:
    """A title as a name of a test."""
    return title.replace(" + ", "_").replace("/", "").replace(", ", "_").replace("_ ", "_").replace(" ", "_")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under default inductor with static shapes, compiled for this case at its first call."""
    return torch.compile(function, dynamic=False)


def like_parameters(
    shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random tensors of these shapes, of the size trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 0.05).to(dtype) for shape in shapes]


def calls_for(numbers: int) -> int:
    """Calls per round: many where a call takes microseconds, and what is measured is the cost of calling."""
    return 20 if numbers < 10_000 else 4 if numbers < 500_000 else 1


def is_memory_bound(numbers: int) -> bool:
    """Whether a share of the roofline says something: below, the cost of a call does."""
    return numbers >= 500_000


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the context torch, and with it fasttransfer, uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lerp_roofline(count: int, suffix: str = "", **more: Any) -> Roofline:
    """`a.lerp_(b, w)` over one flat tensor of that size: two reads and a write per element.

    Not a loop over the list: over small tensors that would measure calls, and be no limit of anything.
    """
    a, b = torch.randn(count), torch.randn(count)
    # `a` tends to `b` and stays there: neither denormals nor infinities, so nothing has to be restored.
    call = Provider(
        "a.lerp_(b, w)" + suffix, lambda x: x.lerp_(b, 0.1), lambda: a, lambda _, out: [out], **more
    )
    return Roofline(call, 3 * 4 * count)
