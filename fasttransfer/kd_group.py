"""Logits whose columns are split over the ranks of a process group, or that are DTensors: checks, then the loss."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from fasttransfer.checks import check_tensor, checks_requested, hides_gradient, shape, values_visible
from fasttransfer.kd_arguments import (
    NumItems,
    Options,
    check_labels,
    check_num_items,
    check_temperature,
    row_values,
)
from fasttransfer.kd_stats import kd_stats
from fasttransfer.ops.sharded import ShardedFunction, Shards, all_gather, distill_shards
from fasttransfer.sharded_params import chunk, is_dtensor, replicated
from fasttransfer.untraced import untraced

_ANY_COLUMN = 2**63 - 1


def local_parts(
    student: Any, teacher: Any, rows: dict[str, Any], options: Options
) -> tuple[Any, Any, dict[str, Any], Shards | None]:
    """What is here of logits that are split, of the arguments of ``rows``, and who has the rest (None: nobody)."""
    rows = {name: replicated(name, x) for name, x in rows.items()}
    if not is_dtensor(student) and not is_dtensor(teacher):
        return student, teacher, rows, Shards(options.group, None, None)
    for name, x, other in (("student", student, "teacher"), ("teacher", teacher, "student")):
        if not is_dtensor(x):
            raise TypeError(
                f"{other}_logits is a DTensor and {name}_logits is {type(x).__name__}: both must be, with the same "
                "placements (distribute_tensor or DTensor.from_local), or neither (to_local() and group=)"
            )
    dims = [_column_dimension(name, x) for name, x in (("student", student), ("teacher", teacher))]
    same = student.device_mesh == teacher.device_mesh and dims[0] == dims[1]
    if not same or student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must be DTensors of the same shape, mesh and placements, got "
            f"{shape(student)} {student.placements} and {shape(teacher)} {teacher.placements}: redistribute one, or "
            "pad the narrower vocabulary and pass vocab_size="
        )
    mesh, dim = student.device_mesh, dims[0]
    if dim is None:
        if options.group is not None:
            raise ValueError("group was given, but the logits are DTensors that no rank holds a part of")
        return student.to_local(), teacher.to_local(), rows, None
    group = mesh.get_group(dim)
    if options.group is not None and options.group != group:
        raise ValueError("group is not the group of the mesh dimension that splits the logits: leave it out")
    if options.inplace:
        raise ValueError("inplace=True cannot be used with logits that are split over ranks")
    columns = student.shape[-1]
    offset, here = chunk(columns, mesh.size(dim), mesh.get_local_rank(dim))
    student, teacher = student.to_local(), teacher.to_local()
    for name, x in (("student", student), ("teacher", teacher)):
        if x.shape[-1] != here:
            raise ValueError(
                f"{name}_logits is a DTensor with {x.shape[-1]} columns on this rank, where Shard(-1) of {columns} "
                f"over {mesh.size(dim)} ranks has {here}: pass to_local() and group="
            )
    return student, teacher, rows, Shards(group, offset, columns)


def _column_dimension(side: str, x: Any) -> int | None:
    """The mesh dimension that splits the columns, None if none does."""
    found = []
    for dim, placement in enumerate(x.placements):
        if placement.is_replicate() or x.device_mesh.size(dim) == 1:
            continue
        if placement.is_partial():
            raise ValueError(
                f"{side}_logits is a DTensor that is Partial on mesh dimension {dim}: it is still to be summed. "
                f"Take {side}_logits.redistribute(placements=...) with Shard(-1) there"
            )
        if type(placement).__name__ != "Shard" or placement.dim != x.dim() - 1:
            raise ValueError(
                f"{side}_logits is a DTensor with {placement} on mesh dimension {dim}: only its last dimension may be "
                "split. Where rows are split, take to_local() of logits and labels (and group= if columns are split "
                "too), and num_items= summed over the ranks that split the rows"
            )
        found.append(dim)
    if len(found) > 1:
        raise ValueError(f"{side}_logits is split by columns over mesh dimensions {found}: one is supported")
    return found[0] if found else None


def _check_shards(student: Tensor, teacher: Tensor, vocab_size: int | None) -> None:
    check_tensor("student_logits", student)
    check_tensor("teacher_logits", teacher)
    if student.device != teacher.device:
        raise ValueError(f"teacher_logits is on {teacher.device}, student_logits on {student.device}")
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must be [..., V_local] with the same columns on each rank, "
            f"got {shape(student)} and {shape(teacher)}. Vocabularies that differ in padding must be split at the same "
            "columns: pad the narrower one, and pass vocab_size="
        )
    if vocab_size is not None and vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")


@untraced
def distill_columns(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    shards: Shards,
    options: Options,
) -> Any:
    """As ``distill_rows``, of this rank's columns."""
    _check_shards(student, teacher, options.vocab_size)
    check_labels(labels, student, _ANY_COLUMN, options)
    constant_t, row_t = check_temperature(temperature, student)
    weight = None if row_weight is None else row_values("row_weight", row_weight, student)
    items, items_tensor = check_num_items(num_items, student, labels is not None, options)
    if options.reduction == "batchmean" and student.dim() == 1:
        raise ValueError(
            "reduction='batchmean' needs student_logits with a first dimension beside V, got one row [V]"
        )
    recording = torch.is_grad_enabled()
    if checks_requested():
        wants = recording and student.requires_grad, recording and teacher.requires_grad
        same = (
            student.shape[:-1],
            student.dtype,
            teacher.dtype,
            options._replace(group=None),
            wants,
            constant_t,
            items,
        )
        _check_same_on_ranks(repr(same), labels, student, shards.group)
    if shards.offset is None and (labels is not None or options.vocab_size is not None):
        shards = _located(student, shards.group)
    if isinstance(shards.total, int):
        _check_columns(labels, student, shards.total, options)

    args = (
        labels, weight, row_t, items_tensor, items, constant_t, options.label_weight or 0.0, options.label_smoothing,
        options.ignore_index, options.distill_ignored, options.vocab_size, options.reduction, options.scale_by_t2,
        options.divergence, list(options.divergence_args), options.standardize, list(options.softcap),
        options.return_stats,
    )  # fmt: skip
    if recording or hides_gradient((student, teacher)):
        loss, stats = ShardedFunction.apply(student, teacher, (shards, args))
    else:
        loss, *_, stats = distill_shards(student, teacher, shards, args, (False, False))
    return (loss, kd_stats(loss, stats, labels, weight, options)) if options.return_stats else loss


def _check_columns(labels: Tensor | None, student: Tensor, total: int, options: Options) -> None:
    if total < 2:
        raise ValueError(f"softmax over {total} column(s) says nothing: that is what all ranks have together")
    if options.vocab_size is not None and options.vocab_size > total:
        raise ValueError(
            f"vocab_size must be between 2 and the {total} columns that all ranks have, got {options.vocab_size}"
        )
    check_labels(labels, student, total if options.vocab_size is None else options.vocab_size, options)


def _located(student: Tensor, group: Any) -> Shards:
    """Where the columns of this rank are. On a device nobody waits for the answer."""
    import torch.distributed as dist

    widths = all_gather(torch.full((1,), student.shape[-1], device=student.device), group)[:, 0]
    offset, total = widths[: dist.get_rank(group)].sum(), widths.sum()
    if values_visible(student):
        return Shards(group, int(offset), int(total))
    return Shards(group, offset, total)


def _check_same_on_ranks(what: str, labels: Tensor | None, student: Tensor, group: Any) -> None:
    """Under FASTTRANSFER_CHECK=1: where ranks differ, what they exchange has different sizes, or no meaning."""
    own = torch.zeros(3, dtype=torch.int64)
    own[0], own[1] = student.shape[:-1].numel(), zlib.crc32(what.encode())
    if labels is not None:
        own[2] = zlib.crc32(repr(labels.flatten().tolist()).encode())
    everybody = all_gather(own.to(student.device), group).cpu()
    for column, name in enumerate(("rows", "shapes, dtypes, options or gradients wanted", "labels")):
        if (everybody[:, column] != everybody[0, column]).any():
            found = f": {everybody[:, 0].tolist()}" if column == 0 else ""
            raise ValueError(
                f"the ranks of group must pass the same {name} (their own columns of them){found}"
            )
