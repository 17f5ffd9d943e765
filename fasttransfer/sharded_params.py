"""Parameters that are split over ranks (DTensors, as ``fully_shard`` makes them): what is here, and who counts what.

Weighted sums and penalties are elementwise: each rank works on its own part, and nothing is exchanged but numbers that
are sums over all elements. Nothing here imports ``torch.distributed.tensor`` unless a tensor has come from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

Split = tuple[tuple[Any, str], ...]

_PLAIN = frozenset({Tensor, nn.Parameter})


def is_dtensor(x: Any) -> bool:
    """Whether it is one; without importing what they come from."""
    return type(x) not in _PLAIN and hasattr(x, "placements") and hasattr(x, "device_mesh")


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether one of them is."""
    return any([is_dtensor(t) for t in tensors if type(t) not in _PLAIN])


def replicated(name: str, x: Any) -> Any:
    """``x``, of a DTensor the copy that is here.

    Raises:
        ValueError: No rank has all of it.
    """
    if not is_dtensor(x):
        return x
    if not all(p.is_replicate() for p in x.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}: every rank needs all of it (Replicate, or a tensor)"
        )
    return x.to_local()


# --------------------------------------------------------------------------------------------- what is here
def chunk(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """First index and number of those that ``Shard`` gives a rank: as torch.chunk, all but the last ones alike."""
    step = -(-length // ranks)
    first = min(rank * step, length)
    return first, min(first + step, length) - first


@_disable_dynamo
def parts(
    labels: Sequence[str],
    owners: Sequence[Any],
    what: Sequence[str],
    others: Sequence[Any],
    *,
    slices: bool = True,
) -> tuple[list[Any], list[Any]]:
    """This rank's parts of ``owners``, and of each of ``others`` what lies beside its owner's part.

    Without communication: of another operand that every rank has whole, its slice is a view. None stays None.

    Args:
        labels: What errors call the owners.
        owners: The tensors that say who has what.
        what: What errors call the others.
        others: Tensors of the owners' (global) shapes.
        slices: Whether others may be whole where their owners are split: not of what is to be written.

    Raises:
        ValueError: A DTensor that is ``Partial``, operands that are split differently.
    """
    here = [_part(label, owner) for label, owner in zip(labels, owners, strict=True)]
    rows = zip(labels, owners, here, what, others, strict=True)
    return here, [None if x is None else _beside(a, p, mine, b, x, slices) for a, p, mine, b, x in rows]


def _part(label: str, t: Any) -> Any:
    if not is_dtensor(t):
        return t
    for dim, placement in enumerate(t.placements):
        if placement.is_partial():
            raise ValueError(
                f"{label} is a DTensor that is Partial on mesh dimension {dim}: it is still to be summed. Pass "
                f"it with Shard or Replicate there ({label}.redistribute(placements=...))"
            )
    if t.device_mesh.get_coordinate() is None:
        raise ValueError(f"{label} is a DTensor on a mesh that this rank is not in: {t.device_mesh}")
    return t.to_local()


def _beside(label: str, owner: Any, here: Tensor, what: str, x: Any, slices: bool) -> Tensor:
    mine: Tensor = _part(what, x)
    whole = not is_dtensor(x) or all(p.is_replicate() for p in x.placements)
    if not is_dtensor(owner):
        if not whole:
            raise ValueError(
                f"{what} is a DTensor with placements {x.placements}, {label} a tensor that is whole on every rank: "
                f"pass {what}.full_tensor(), or split {label} the same way"
            )
        return mine
    if is_dtensor(x) and x.device_mesh == owner.device_mesh and x.placements == owner.placements:
        return mine
    if is_dtensor(x) and not (whole and slices):
        raise ValueError(
            f"{what} and {label} are DTensors that are split differently: {x.placements} on {x.device_mesh}, and "
            f"{owner.placements} on {owner.device_mesh}. Redistribute one, or pass {what}.full_tensor()"
        )
    if not _split_over(owner):
        return mine
    if mine.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{what} requires grad and is whole on every rank, where {label} is a DTensor with placements "
            f"{owner.placements}: each rank would have a part of its gradient. Pass a DTensor of those placements, or "
            f"{what}.detach()"
        )
    return _slice(mine.detach(), owner, here)


def _slice(x: Tensor, owner: Any, here: Tensor) -> Tensor:
    """Of a whole tensor the part that this rank has of ``owner``."""
    mesh = owner.device_mesh
    if all(p.is_replicate() or type(p).__name__ == "Shard" for p in owner.placements):
        for dim, placement in enumerate(owner.placements):
            if placement.is_shard():
                at = chunk(x.shape[placement.dim], mesh.size(dim), mesh.get_local_rank(dim))
                x = x.narrow(placement.dim, *at)
    else:  # FSDP over tensor parallelism: one dimension split twice, the later mesh dimension first
        from torch.distributed.tensor import distribute_tensor

        x = distribute_tensor(x, mesh, owner.placements, src_data_rank=None).to_local()
    if x.shape != here.shape:
        raise ValueError(
            f"a DTensor of shape {list(owner.shape)} and placements {owner.placements} has {list(here.shape)} on this "
            f"rank, where torch.chunk gives {list(x.shape)}: pass the other operand as a DTensor too"
        )
    return x


# ----------------------------------------------------------------------------------------- DTensors from parts
def like(label: str, owner: Any, what: str, x: Tensor) -> Tensor:
    """``x``; where ``owner`` is a DTensor, a copy that is split as that is. Errors as ``parts``."""
    if not any_dtensor((owner, x)):
        return x
    with torch.no_grad():
        (mine,) = parts([label], [owner], [what], [x])[1]
        if not is_dtensor(owner):
            return mine
        split: Any = torch.empty_like(owner, dtype=x.dtype)
        split.to_local().copy_(mine)
        return split


def whole(here: Tensor, owner: Any) -> Tensor:
    """The DTensor, split as ``owner`` is, of which this rank has ``here``; differentiable."""
    if not is_dtensor(owner):
        return here
    return type(owner).from_local(
        here, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
    )


def count_writes(owners: Iterable[Any]) -> None:
    """Count a write to the parts of these tensors, which their own version counters have not seen."""
    split = [t for t in owners if is_dtensor(t)]
    if split:
        increment_version(split)


# ------------------------------------------------------------------------------------------- sums over ranks
def alike(owners: Sequence[Any]) -> list[list[bool]]:
    """Who of them is split between the same ranks, as one mask for each such set; first those that are not split."""
    keys = [_split_over(t) for t in owners]
    return [[key == one for key in keys] for one in sorted(dict.fromkeys(keys), key=len)]


def _split_over(t: Any) -> Split:
    """The groups of ranks between which the tensor is split, with their kind of device; none: each has all of it."""
    if not is_dtensor(t):
        return ()
    mesh = t.device_mesh
    dims = [
        d for d, placement in enumerate(t.placements) if not placement.is_replicate() and mesh.size(d) > 1
    ]
    return tuple((mesh.get_group(d), mesh.device_type) for d in dims)


def sum_over_ranks(values: Tensor, owners: Sequence[Any]) -> Tensor:
    """``values``, each a sum over its owner's elements here, as sums over those of all ranks. Backward: the identity.

    One all-reduce for each mesh dimension that splits any of the owners. Copies of the same are not added up.
    """
    splits = [_split_over(t) for t in owners]
    return values if not any(splits) else _Sum.apply(values, splits)


def sum_gradients_over_ranks(values: Tensor, owners: Sequence[Any]) -> Tensor:
    """``values``, copies on every rank; the gradient of each is summed over the ranks that split its owner."""
    splits = [_split_over(t) for t in owners]
    return values if not any(splits) or not values.requires_grad else _SumOfGradients.apply(values, splits)


def _all_reduced(values: Tensor, splits: Sequence[Split]) -> Tensor:
    import torch.distributed as dist

    values = values.clone()
    for group, device in dict.fromkeys(one for split in splits for one in split):
        which = [i for i, split in enumerate(splits) if (group, device) in split]
        some = values[which].to(device)  # parameters may be kept on the CPU, beside their mesh
        dist.all_reduce(some, group=group)
        values[which] = some.to(values.device)
    return values


class _Sum(torch.autograd.Function):
    @staticmethod
    @_disable_dynamo
    def forward(ctx: Any, values: Tensor, splits: Any) -> Tensor:
        return _all_reduced(values, splits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, splits: Any) -> Tensor:
        ctx.splits = splits
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not supported through an alpha of tensors that are split over ranks"
            )
        return _all_reduced(upstream, ctx.splits), None


# ------------------------------------------------------------------------------------------------------ FSDP2
def reshard(module: nn.Module) -> None:
    """Let FSDP2 put the split parameters back into the module, where it has gathered them.

    After a forward pass it leaves the outermost module's parameters gathered: that copy is not what the optimizer
    trains, and is not gathered anew for the next forward pass, whatever has been written to the parameters meanwhile.
    Backward gathers what it needs again.
    """
    if torch.compiler.is_compiling():
        return
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        for m in module.modules():
            if isinstance(m, kind):
                m.reshard()
