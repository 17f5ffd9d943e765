"""The dispatcher library ``fasttransfer``: how an operation is defined, and how a backend is chosen.

Every operation has a schema and a pure-torch kernel, registered here under ``CompositeExplicitAutograd``, so it
runs on every device. Compiled libraries register their own key (``CPU``, ``CUDA``) over it; torch's dispatcher
picks. There is no ``if cuda`` anywhere in this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

NAMESPACE = "fasttransfer"

_library = Library(NAMESPACE, "DEF")
_references: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[int] = (),
) -> Any:
    """Define ``fasttransfer::name`` and return its overload.

    Args:
        name: The operation's name.
        schema: Arguments and returns, as in ``"(Tensor x) -> Tensor"``.
        reference: The pure-torch kernel, which defines what the operation computes.
        fake: Shapes and dtypes of the result, for ``torch.compile``.
        mutates: Positions of the arguments (tensors or lists of tensors) that the operation overwrites.
    """
    _library.define(name + schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _references[name] = reference
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if mutates:
        _bump_versions(name, overload, mutates)
    return overload


def _bump_versions(name: str, overload: Any, mutates: Sequence[int]) -> None:
    """Count the mutation in the tensors' version counters.

    ``Library.define`` does not do this for ``Tensor(a!)`` arguments, ``opcheck`` does not notice, and autograd
    would silently use an overwritten tensor that it had saved for backward.
    """

    def bump(keys: Any, *args: Any) -> Any:
        mutated: list[torch.Tensor] = []
        for i in mutates:
            mutated += [args[i]] if isinstance(args[i], torch.Tensor) else args[i]
        torch.autograd.graph.increment_version(mutated)
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(name, bump, "ADInplaceOrView", with_keyset=True)


_override: Library | None = None


def reference_forced() -> bool:
    """Whether the pure-torch kernels run also where compiled ones are loaded."""
    return _override is not None


def force_reference(on: bool, keys: Sequence[str] = ("CPU", "CUDA")) -> None:
    """Put the pure-torch kernels over the compiled ones, or take them away again."""
    global _override
    if on == reference_forced():
        return
    if _override is not None:
        _override._destroy()
        _override = None
        return
    _override = Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is overridden, which is the point
        for name, reference in _references.items():
            for key in keys:
                _override.impl(name, reference, key, allow_override=True)


def accumulator(t: torch.Tensor) -> torch.dtype:
    """What sums are kept in: double where the device has it, since differences of logarithms of sums cancel."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """What elementwise arithmetic runs in: fp32, or fp64 as soon as one operand is."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
