"""The usual calls, past the general checks: those cost 30 us, and for each tensor more than its arithmetic.

A function here serves what is certainly right, and says no, with nothing done, to all else: that goes the general way,
which finds out what is wrong and has the words for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from fasttransfer.memory import are_contiguous, plainly_separate
from fasttransfer.ops.blend import blend_plain_op
from fasttransfer.ops.l2sp import l2sp_add_grad_plain_op

# A dispatcher call without autograd and without the count of versions, for half of what torch.no_grad costs.
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_PLAIN = frozenset({Tensor, nn.Parameter})  # nothing that overrides what it means to compute with it
_SEQUENCES = frozenset({list, tuple})
_INF = float("inf")
_FLOAT, _DOUBLE = torch.float32, torch.float64
_LARGE = 1 << 22  # bytes from which on the native kernel is faster than torch's lerp

# For all(map(...)) and the like, a little faster than a comprehension.
_dtype, _shape, _is_cpu, _layout = map(attrgetter, ("dtype", "shape", "is_cpu", "layout"))
_requires_grad, _is_leaf, _grad, _version = map(attrgetter, ("requires_grad", "is_leaf", "grad", "_version"))


def undisturbed() -> bool:
    """Whether neither torch.compile, forward-mode derivatives nor a transform of torch.func are at work.

    A call past the general checks might drop what they are after without a word.
    """
    return not is_compiling() and forward_ad._current_level < 0 and peek_interpreter_stack() is None


def lerp(target: Any, source: Any, alpha: float) -> list[Tensor] | None:
    """``blend`` of what torch's own lerp computes, without a graph or with torch's; None: nothing has been done."""
    pairs = _lerp_pairs(target, source, alpha)
    return None if pairs is None else list(torch._foreach_lerp(*pairs, 1 - alpha))


def lerp_or_blend_(target: Any, source: Any, alpha: Any) -> bool:
    """``blend_`` of tensors or lists in the way that is fastest for them."""
    t, s = target, source
    if type(t) is type(s) is list and len(t) == len(s) == 1:
        t, s = target[0], source[0]
    return (
        (type(t) in _PLAIN and _lerp_one_(t, s, alpha))
        or blend_(target, [source], alpha, [1.0])
        or _lerp_(target, source, alpha)
    )


def blend_(target: Any, sources: Sequence[Any], alpha: float, weights: list[float]) -> bool:
    """``blend_`` and ``blend_many_`` of tensors or lists, any dtypes, in one call of the native kernel."""
    if not -_INF < alpha < _INF:
        return False
    if type(target) in _PLAIN:
        targets, others = [target], sources
    elif type(target) in _SEQUENCES and target and _SEQUENCES.issuperset(map(type, sources)):
        if not {len(target)}.issuperset(map(len, sources)):
            return False
        targets, others = target, sources[0] if len(sources) == 1 else list(chain(*sources))
    else:
        return False
    if not (_PLAIN.issuperset(map(type, targets)) and _PLAIN.issuperset(map(type, others))):
        return False
    return _writing(targets, blend_plain_op, targets, others, alpha, weights) is True


def l2sp_add_grad_(params: Any, start: Any, strength: Any, grad_scale: Any) -> Tensor | None:
    """``l2sp_add_grad_`` of lists (or single tensors) in which every parameter has a start point and a gradient."""
    scale = 1.0 if grad_scale is None else grad_scale
    if not (type(strength) is type(scale) is float and 0 <= strength < _INF and 0 <= scale < _INF):
        return None
    if type(params) in _PLAIN:
        params, start = [params], [start]
    elif not (type(params) in _SEQUENCES and type(start) in _SEQUENCES and 0 < len(params) == len(start)):
        return None
    if not (
        _PLAIN.issuperset(map(type, params))
        and _PLAIN.issuperset(map(type, start))
        and all(map(_requires_grad, params))
        and all(map(_is_leaf, params))
    ):
        return None
    grads = list(map(_grad, params))
    if not _PLAIN.issuperset(map(type, grads)):
        return None
    value: Tensor | None = _writing(grads, l2sp_add_grad_plain_op, params, start, grads, strength, scale)
    return value


def _lerp_one_(t: Tensor, s: Any, alpha: float) -> bool:
    """``blend_`` of one tensor by torch's own lerp, at the price of the two torch calls that users write today.

    Lerp itself refuses, before it writes, a source that lies across the target.
    """
    if type(s) not in _PLAIN or not 0.5 < alpha < 1:
        return False
    try:
        dtype = t.dtype
        if (
            (dtype is not _FLOAT and dtype is not _DOUBLE)
            or s.dtype is not dtype  # lerp would refuse it too, but an exception takes 40 us
            or not (t.is_cpu and s.is_cpu and t.is_contiguous() and s.is_contiguous())
            or t.shape != s.shape
            or (t.requires_grad or s.requires_grad)
            or t.nbytes >= _LARGE
            or t._version < 0  # which an inference tensor does not have
        ):
            return False
        torch._foreach_lerp_([t], [s], 1 - alpha)  # sooner there than t.lerp_
    except RuntimeError:  # also: no shape (nested), no strides (sparse)
        return False
    return True


def _lerp_(target: Any, source: Any, alpha: float) -> bool:
    """``blend_`` of lists by torch's own lerp, where there is no native kernel: that one is faster."""
    pairs = _lerp_pairs(target, source, alpha)
    if pairs is None or not plainly_separate(*pairs):
        return False
    increment_version(pairs[0])
    with _below_autograd():
        torch._foreach_lerp_(*pairs, 1 - alpha)
    return True


def _lerp_pairs(target: Any, source: Any, alpha: float) -> tuple[list[Tensor], list[Tensor]] | None:
    """The two lists, if their blend is what torch's own lerp computes, at the speed of memory: same dtype and shape.

    Its formula is ours for ``0.5 < alpha < 1``: around the target. (Below, it takes ``alpha`` to be
    ``1 - float(1 - alpha)``, which is rounded; at 1 it looks at the source, of which nothing is wanted.)
    """
    if not 0.5 < alpha < 1:
        return None
    if type(target) in _PLAIN:
        target, source = [target], [source]
    elif not (type(target) in _SEQUENCES and type(source) in _SEQUENCES and 0 < len(target) == len(source)):
        return None
    both = [*target, *source]
    try:
        fine = (
            _PLAIN.issuperset(map(type, both))
            and set(map(_dtype, both)) in ({_FLOAT}, {_DOUBLE})
            and all(map(_is_cpu, both))
            and set(map(_layout, both)) == {torch.strided}
            and list(map(_shape, target)) == list(map(_shape, source))
            and are_contiguous(both)
        )
    except RuntimeError:  # no shape (nested); no strides (sparse)
        return None
    return (target, source) if fine else None


def _writing(written: Sequence[Tensor], op: Any, *args: Any) -> Any:
    """``op(*args)`` below autograd, counted as a write; None if it refuses, by None, by false or by an error."""
    try:
        # An inference tensor has no version: this raises, in less time than is_inference() takes to be asked.
        list(map(_version, written))
        with _below_autograd():
            result = op(*args)
    except RuntimeError:
        return None
    if result is None or result is False:
        return None
    increment_version(written)
    return result
