"""The models on the line between two: one working copy, which each alpha overwrites in one pass over the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.blend import Coefficient, Transform, _Plan, blend_many_


class ModelLine:
    """``alpha * target + source_scale * T(source)`` for one alpha after another, in the same working module.

    ``T(source)`` is computed once. Memory beside the two models: the working copy, and ``T(source)`` if there is one.

    Args:
        target: As in ``blend``; not modified.
        source: As in ``blend``; not modified.
        source_scale: As in ``blend``.
        transform: As in ``blend``.

    Raises:
        TypeError, ValueError: As ``blend``.
    """

    def __init__(
        self, target: nn.Module, source: Any, source_scale: Coefficient | None, transform: Transform
    ) -> None:
        with torch.no_grad():
            # With an alpha that is a tensor T(source) is made, for all alphas, and not fused into one blend.
            plan = _Plan(target, [source], torch.ones(()), source_scale, transform, None, "blend")
        self._target, self._names = target, plan.names
        self._ends = plan.targets, [row[0] for row in plan.rows]
        scales = plan.scale if plan.scale_tensor is None else plan.scale_tensor.tolist()
        self._positions: dict[float | None, list[int]] = {}  # of the tensors that share a source_scale
        for i in range(len(plan.names)):
            self._positions.setdefault(scales[i] if scales else None, []).append(i)
        self._work: _WorkingCopy | None = None

    def at(self, alpha: float) -> nn.Module:
        """The working module, as a new copy of the target but for its blended tensors."""
        if self._work is None or not self._work.restore():
            self._work = None  # before the next one is made
            self._work = _WorkingCopy(self._target)
        tensors = self._work.tensors
        blended = [tensors[name] for name in self._names]
        written = set(map(id, blended))
        with torch.no_grad():
            for name, t in _tensors(self._target).items():
                if id(tensors[name]) not in written:
                    tensors[name].copy_(t)
            for scale, at in self._positions.items():
                # The working copy counts nothing, and is not read. The larger weight first, as in blend.
                ends = [(alpha, self._ends[0]), (1 - alpha if scale is None else scale, self._ends[1])]
                if alpha < 0.5:
                    ends.reverse()
                blend_many_(
                    [blended[i] for i in at],
                    [[end[i] for i in at] for _, end in ends],
                    0.0,
                    weights=[weight for weight, _ in ends],
                    source_scale=None if scale is None else 1.0,
                )
        return self._work.module


class _WorkingCopy:
    """A copy of a module that can be made to look new, but for the values of its tensors."""

    def __init__(self, target: nn.Module) -> None:
        self.module = copy.deepcopy(target)
        self.tensors = _tensors(self.module)
        self._states = [(m, m.training, _shallow(vars(m))) for m in self.module.modules()]
        self._memory = {name: _memory_of(t) for name, t in self.tensors.items()}
        self._requires_grad = {name: t.requires_grad for name, t in self.tensors.items()}

    def restore(self) -> bool:
        """Undo what somebody has done to modules and tensors; False where a new copy is needed."""
        for module, training, state in self._states:
            vars(module).clear()
            vars(module).update(_shallow(state))
            module.training = training
        for name, t in self.tensors.items():
            if not t.is_leaf or _memory_of(t) != self._memory[name]:
                return False
            t.requires_grad_(self._requires_grad[name])
            t.grad = None
        return True


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(module.named_buffers(remove_duplicate=False))


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes, with copies of what holds its tensors, layers and hooks."""
    return {k: copy.copy(v) if isinstance(v, (dict, set, list)) else v for k, v in state.items()}


def _memory_of(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.device, t.shape, t.stride(), t.untyped_storage().data_ptr()
