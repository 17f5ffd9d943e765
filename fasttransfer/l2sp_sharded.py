"""The L2-SP penalty of parameters that are split over ranks: every rank's part by the functions for what is whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttransfer.ops.library import accumulator, compute_dtype
from fasttransfer.sharded_params import alike, any_dtensor, count_writes, is_dtensor, parts, sum_over_ranks

if TYPE_CHECKING:
    from fasttransfer.l2sp import Selection


def is_split(selected: Selection) -> bool:
    """Whether a tensor of a selection is a DTensor."""
    return any_dtensor(selected.params) or any_dtensor([*selected.start, *selected.importance])


def value_over_ranks(selected: Selection, value_of: Callable[[Selection], Tensor]) -> Tensor:
    """The penalty, from ``value_of`` the parts that are here; one number is exchanged, where something is split."""
    return _total(selected, parts_here(selected), value_of, over_ranks=True)


@torch.no_grad()
def add_grad_over_ranks_(
    selected: Selection, add_grad_: Callable[[Selection], Tensor], over_ranks: bool
) -> Tensor:
    """``add_grad_`` of the parts that are here; the penalty, or what is here of it: nothing is exchanged for that."""
    owners = selected.params
    for name, p in zip(selected.names, owners, strict=True):
        if not p.is_leaf:
            raise ValueError(
                f"{selected.label(name)} is not a leaf: it keeps no .grad to add to. Use l2sp_penalty"
            )
    here = parts_here(selected)
    split = [i for i, p in enumerate(owners) if is_dtensor(p)]
    old = [i for i in split if owners[i].grad is not None]
    labels = [selected.label(selected.names[i]) for i in old]
    of = [f"the gradient of {label}" for label in labels]
    grads = [owners[i].grad for i in old]
    local_grads = parts(labels, [owners[i] for i in old], of, grads, slices=False)[1]
    for i in split:  # leaves on the same memory, with a gradient of their own
        here.params[i] = here.params[i].detach()
    for i, g in zip(old, local_grads, strict=True):
        here.params[i].grad = g
    value = _total(selected, here, add_grad_, over_ranks)
    count_writes(grads)
    for i in split:
        written = here.params[i].grad
        if owners[i].grad is None and written is not None:
            grad: Any = torch.empty_like(owners[i])
            grad.to_local().copy_(written)
            owners[i].grad = grad
    return value


def parts_here(selected: Selection) -> Selection:
    """This rank's parts of the parameters, and what of the rest lies beside them; differentiable."""
    labels = [selected.label(name) for name in selected.names]
    points = [f"the start point of {label}" for label in labels]
    params, start = parts(labels, selected.params, points, selected.start)
    importance = selected.importance
    if importance:
        weights = [f"the importance of {label}" for label in labels]
        importance = parts(labels, selected.params, weights, importance)[1]
    return selected._replace(params=params, start=start, importance=importance)


def _total(
    selected: Selection, here: Selection, value_of: Callable[[Selection], Tensor], over_ranks: bool
) -> Tensor:
    groups = alike(selected.params)
    values = [value_of(here.part(kept)) for kept in groups]
    wide = torch.stack([value.to(accumulator(value)) for value in values])
    if over_ranks:
        wide = sum_over_ranks(wide, [next(compress(selected.params, kept)) for kept in groups])
    return wide.sum().to(compute_dtype(*selected.params))
