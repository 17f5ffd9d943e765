"""Who shares memory with whom: checks before several threads write to tensors of the caller; the usual case at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import add, le
from typing import Any

import torch
from torch import Tensor


def overlaps_itself(t: Tensor) -> bool:
    """Whether two indices of ``t`` may be the same memory (an expanded tensor): such a tensor cannot be written."""
    if t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def written_once(
    labels: Sequence[str],
    targets: Sequence[Tensor],
    rows: Sequence[Sequence[Tensor]],
    coefficients: Sequence[Any],
) -> list[int]:
    """Which targets to write: all, but tied ones once. Memory may have one writer only, and no reader beside it.

    Args:
        labels: What errors call the targets.
        targets: To be overwritten.
        rows: What each target is computed from.
        coefficients: What else each target is computed from; compared between tied targets.

    Raises:
        ValueError: A target that overlaps itself or another one, tied targets that are computed differently, a
            source that overlaps a target otherwise than as that target itself, an inference tensor outside of
            inference mode.
    """
    everything = [s for row in rows for s in row]
    if are_contiguous(targets) and are_contiguous(everything) and plainly_separate(targets, everything):
        return list(range(len(targets)))
    for i, t in enumerate(targets):
        if overlaps_itself(t):
            raise ValueError(f"{labels[i]} cannot be overwritten: its elements overlap in memory (expanded?)")
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{labels[i]} is an inference tensor: it can be overwritten in torch.inference_mode only"
            )
    kept = _without_tied(labels, targets, rows, coefficients)
    _check_separate(labels, targets, rows, kept)
    return kept


def are_contiguous(tensors: Iterable[Tensor]) -> bool:
    """Whether all are."""
    return all([t.is_contiguous() for t in tensors])


def plainly_separate(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Whether no target touches anything else: the usual case, at once. All are contiguous."""
    if any([t.is_inference() for t in targets]):
        return False
    if len(targets) == len(sources) == 1:
        t, s = targets[0], sources[0]
        a, b = t.data_ptr(), s.data_ptr()
        return a + t.nbytes <= b or b + s.nbytes <= a
    starts = [t.data_ptr() for t in targets]
    starts += [s.data_ptr() for s in sources]
    stops = list(map(add, starts, [t.nbytes for t in targets] + [s.nbytes for s in sources]))
    # Nothing touches anything if each range ends before the next one begins.
    if all(map(le, sorted(stops), sorted(starts)[1:])):
        return True
    count = len(targets)
    ranges = sorted(
        (start, stop, i < count) for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
    target_end = end = 0
    for start, stop, is_target in ranges:
        if start < (end if is_target else target_end):
            return False
        end = max(end, stop)
        if is_target:
            target_end = end
    return True


def _without_tied(
    labels: Sequence[str],
    targets: Sequence[Tensor],
    rows: Sequence[Sequence[Tensor]],
    coefficients: Sequence[Any],
) -> list[int]:
    seen: dict[int, int] = {}  # by address
    kept = []
    for i, t in enumerate(targets):
        address = t.data_ptr()
        j = seen.setdefault(address, i) if address and t.numel() else i  # the meta device's address is 0
        if j == i or _view(t) != _view(targets[j]):
            kept.append(i)
        elif [_view(s) for s in rows[i]] != [_view(s) for s in rows[j]] or coefficients[i] != coefficients[j]:
            raise ValueError(
                f"{labels[j]} and {labels[i]} are the same memory, but their sources or alphas differ"
            )
    return kept


def _check_separate(
    labels: Sequence[str], targets: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], kept: Sequence[int]
) -> None:
    """Compares ranges of addresses: what lies interleaved without sharing an element is refused as well."""
    ranges = sorted((*_range(targets[i]), i) for i in kept if targets[i].numel() and targets[i].data_ptr())
    for (_, stop, i), (start, _, j) in pairwise(ranges):
        if start < stop:
            raise ValueError(
                f"{labels[i]} and {labels[j]} cannot be overwritten: their memory ranges overlap"
            )
    starts = [start for start, _, _ in ranges]
    for i in kept:
        for s in rows[i]:
            start, stop = _range(s)
            before = bisect_left(starts, stop) - 1  # the last target that begins before the source ends
            if before < 0 or ranges[before][1] <= start or _view(s) == _view(targets[i]) or not s.numel():
                continue
            raise ValueError(
                f"{labels[ranges[before][2]]} cannot be overwritten: the memory range of the source of {labels[i]} "
                "overlaps; pass a clone"
            )


def _range(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the byte past its last."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    reach = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return start, start + (reach + 1) * t.element_size()


def _view(t: Tensor) -> Any:
    return t.data_ptr(), t.dtype, t.shape, t.stride()
