"""The L2-SP penalty: fine-tuning pulled towards its starting point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer import fast_lists
from fasttransfer.checks import (
    FLOATS,
    all_usable,
    check_number,
    check_tensor,
    hides_gradient,
    shape,
)
from fasttransfer.memory import written_once
from fasttransfer.names import Tensors, check_patterns, collect, match, matches
from fasttransfer.ops.blend import blend_inplace_op
from fasttransfer.ops.l2sp import L2SPFunction, difference, l2sp_add_grad_op, l2sp_value_op
from fasttransfer.tensor_tree import TensorTree, split_name


def l2sp_penalty(params: Tensors, start: Tensors, strength: float) -> Tensor:
    r"""``strength * sum ||p - p0||^2``, differentiable in ``params``.

    Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (2018),
    eq. 3, without its 1/2: the paper's alpha is ``2 * strength``. The gradient is ``2 * strength * (p - p0)``, 0 at
    the start point. Inside a training loop ``l2sp_add_grad_`` does the same without a graph, in one pass.

    Args:
        params: A list, dict or module (or one tensor), of float32, bfloat16, float16 or float64 tensors.
        start: The start points, matched by position, length and shape (list) or by name and shape (dict, module).
            Constants: no gradient flows to them. Their dtypes may differ from the parameters'.
        strength: The lambda, at least 0.

    Returns:
        A scalar, float32 (float64 if any parameter is): accumulated in fp32 blocks and float64 sums.

    Raises:
        TypeError: Something that is no tensor, or of another dtype; a strength that is no number.
        ValueError: Names, lengths, shapes or devices that do not match (the error names the parameter and both
            shapes), the same tensor twice, a negative strength.
    """
    return _penalty(_check_pairs(params, start, check_number("strength", strength, 0)))


def l2sp_add_grad_(
    params: Tensors, start: Tensors, strength: float, *, grad_scale: float | Tensor | None = None
) -> Tensor:
    """Add the penalty's gradient to ``p.grad`` and return the penalty: one pass over the list, no graph.

    ``p.grad += grad_scale * 2 * strength * (p - p0)``. Where ``p.grad`` is None it is written. Call it between
    ``backward()`` and ``optimizer.step()``, once per optimizer step: after ``scaler.unscale_`` and the all-reduce of
    gradients, before gradient clipping. Tensors that do not require grad (frozen) are skipped.

    Args:
        params: As in ``l2sp_penalty``.
        start: As in ``l2sp_penalty``.
        strength: As in ``l2sp_penalty``.
        grad_scale: Multiplies the gradient only, for gradients that are still scaled by a ``GradScaler``: a number
            or a one-element float tensor (read on its device, without a synchronisation). Default 1.

    Returns:
        The unscaled penalty, a detached scalar, float32 (float64 if any parameter is).

    Raises:
        TypeError, ValueError: As ``l2sp_penalty``; also for a sparse gradient, or gradients that overlap in
            memory. Nothing has been modified then.
    """
    if isinstance(params, Iterator):
        params = list(params)
    if fast_lists.undisturbed():
        value = fast_lists.l2sp_add_grad_(params, start, strength, grad_scale)
        if value is not None:
            return value
    return _add_grad_(
        _check_pairs(params, start, check_number("strength", strength, 0)).trained(), grad_scale
    )


def l2sp_prox_(params: Tensors, start: Tensors, strength: float, lr: float) -> None:
    """The proximal step of the penalty, in place: ``p = (p + h p0) / (1 + h)`` with ``h = 2 * lr * strength``.

    The minimiser of ``strength * ||x - p0||^2 + ||x - p||^2 / (2 lr)`` (Parikh and Boyd, "Proximal Algorithms"
    (2014), section 6.1.1): stable for any ``h``, and not rescaled by an adaptive optimizer. Call it after
    ``optimizer.step()`` in place of the gradient. Tensors that do not require grad (frozen) are skipped.

    Args:
        params: As in ``l2sp_penalty``.
        start: As in ``l2sp_penalty``.
        strength: As in ``l2sp_penalty``.
        lr: The step size of the optimizer, at least 0.

    Raises:
        TypeError, ValueError: As ``l2sp_penalty``; also for a parameter whose elements overlap in memory.
    """
    step = check_number("lr", lr, 0)
    _prox_(_check_pairs(params, start, check_number("strength", strength, 0)).trained(), step)


class _Selection(NamedTuple):
    """Parameters with their start points (None: 0) and strengths."""

    names: list[str]
    label: Callable[[str], str]  # what an error calls a name
    params: list[Tensor]
    start: list[Tensor | None]
    strength: list[float]

    def trained(self) -> _Selection:
        """Without what is frozen."""
        return self.part([p.requires_grad for p in self.params])

    def part(self, kept: Sequence[bool]) -> _Selection:
        """Those that are marked."""
        if all(kept):
            return self
        names, params, start, strength = (
            [x for x, keep in zip(column, kept, strict=True) if keep]
            for column in (self.names, self.params, self.start, self.strength)
        )
        return _Selection(names, self.label, params, start, strength)  # type: ignore[arg-type]


class L2SP(nn.Module):
    """The L2-SP penalty of a model, with its start points.

    ``strength * sum ||p - p0||^2`` over the parameters that have a start point, plus
    ``new_strength * sum ||p||^2`` over those that have none. Start points are clones, part of the ``state_dict`` and
    moved by ``.to()``. The model is not registered as a submodule. Frozen parameters (``requires_grad=False`` at the
    time of the call) are skipped; tied parameters count once.

    Args:
        model: The model that is fine-tuned. Which of its parameters are penalised is settled here; they are looked up
            by name at each call, so that ``load_state_dict(assign=True)`` or a replaced layer does not leave this
            module with parameters that nobody trains.
        strength: The lambda of the old parameters, at least 0.
        start: None: the parameters as they are now. Or a state dict or a module, matched by name and shape: a
            parameter that is missing there, or has another shape there (a replaced head), is a new one.
        new: Names or glob pattern(s) of parameters that are new ones whatever ``start`` has under their names: a
            replaced head of the old shape, or one in a snapshot. What ``replace_head`` returns will do. All of them
            may be new.
        new_strength: The lambda of the new parameters, at least 0.
        include: Glob pattern(s) over parameter names; only these are penalised. Default: all.
        exclude: Glob pattern(s) over parameter names that are not penalised at all.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A negative strength, a pattern that matches nothing, a ``start`` that shares no parameter.

    Example:
        >>> reg = L2SP(model, 0.01, start=pretrained.state_dict(), new_strength=0.001)
        >>> (task_loss + reg()).backward()          # through autograd, or, faster:
        >>> task_loss.backward(); reg.add_grad_(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        start: Mapping[str, Tensor] | nn.Module | None = None,
        new: str | Iterable[str] | None = None,
        new_strength: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.strength = check_number("strength", strength, 0)
        self.new_strength = check_number("new_strength", new_strength, 0)
        found = collect("model", model)
        included = check_patterns("include", include, found.aliases)
        excluded = check_patterns("exclude", exclude, found.aliases)
        renewed = check_patterns("new", new, found.aliases)
        params: dict[str, Tensor] = {}
        for name, p in found.tensors.items():
            names = found.names_of(name)
            wanted = include is None or any(matches(n, included) for n in names)
            if p.dtype in FLOATS and wanted and not any(matches(n, excluded) for n in names):
                params[name] = p
        if not params:
            raise ValueError("model has no floating parameters left to penalise after include and exclude")
        aliases = {name: found.names_of(name) for name in params}
        old = {name: p for name, p in params.items() if not any(matches(n, renewed) for n in aliases[name])}
        points = _start_points(old, aliases, start)
        # In a tuple: registered, the model's parameters would be in this module's state_dict and moved by its .to().
        self._model = (model,)
        self._paths = [(name, *split_name(name)) for name in params]
        self.start = TensorTree(points, "start points")
        self.new_names = tuple(name for name in params if name not in points)

    def forward(self) -> Tensor:
        """The penalty, a scalar that is differentiable in the model's parameters."""
        return _penalty(self._active())

    def add_grad_(self, *, grad_scale: float | Tensor | None = None) -> Tensor:
        """Add the penalty's gradient to the parameters' ``.grad`` and return the penalty, as ``l2sp_add_grad_``."""
        return _add_grad_(self._active(), grad_scale)

    def prox_(self, lr: float) -> None:
        """The proximal step at step size ``lr``, in place, as ``l2sp_prox_``."""
        _prox_(self._active(), check_number("lr", lr, 0))

    @torch.no_grad()
    def distance(self) -> dict[str, Tensor]:
        """``||p - p0||`` per parameter that has a start point, frozen ones included: scalars on their device."""
        points, params = self.start.tensors(), self._params()
        return {name: torch.linalg.vector_norm(difference(params[name], p0)) for name, p0 in points.items()}

    def extra_repr(self) -> str:
        """Strengths and how many parameters have a start point."""
        counts = f"with_start={len(self._paths) - len(self.new_names)}, new={len(self.new_names)}"
        return f"strength={self.strength}, new_strength={self.new_strength}, {counts}"

    def _params(self) -> dict[str, Tensor]:
        """The model's parameters as they are now, by name."""
        (model,) = self._model
        owners: dict[str, nn.Module] = {}
        params: dict[str, Tensor] = {}
        for name, path, leaf in self._paths:
            if path not in owners:
                try:
                    owners[path] = model.get_submodule(path)
                except AttributeError:
                    raise ValueError(f"model no longer has a module {path!r}: make a new L2SP") from None
            p = owners[path]._parameters.get(leaf)
            if p is None:
                raise ValueError(f"model no longer has a parameter {name!r}: make a new L2SP")
            params[name] = p
        return params

    def _active(self) -> _Selection:
        """What is penalised at this moment."""
        points = self.start.tensors()
        active = _Selection([], "parameter {!r}".format, [], [], [])
        for name, p in self._params().items():
            p0 = points.get(name)
            if not p.requires_grad or (p0 is None and self.new_strength == 0):
                continue
            if p0 is not None and p0.shape != p.shape:
                raise ValueError(
                    f"the start point of {name!r} has shape {shape(p0)}, the parameter now {shape(p)}"
                )
            if p0 is not None and p0.device != p.device:
                raise ValueError(
                    f"the start point of {name!r} is on {p0.device}, the parameter on {p.device}: call .to() on this "
                    "L2SP as well"
                )
            active.names.append(name)
            active.params.append(p)
            active.start.append(p0)
            active.strength.append(self.new_strength if p0 is None else self.strength)
        return active


def _start_points(
    params: Mapping[str, Tensor], aliases: Mapping[str, list[str]], start: Any
) -> dict[str, Tensor]:
    """Clones of the start points of those parameters that have one, under any of a tied parameter's names."""
    if start is None:
        given: Mapping[str, Any] = params
    elif isinstance(start, (nn.Module, Mapping)):
        given = collect("start", start).aliases if isinstance(start, nn.Module) else start
    else:
        raise TypeError(f"start must be None, a state dict or a module, got {type(start).__name__}")
    points: dict[str, Tensor] = {}
    for name, p in params.items():
        for alias in aliases[name]:
            p0 = given.get(alias)
            if isinstance(p0, Tensor) and p0.shape == p.shape:
                check_tensor(f"start point of {alias!r}", p0)
                points[name] = p0.detach().to(p.device, copy=True)
                break
    if params and not points:
        raise ValueError(
            "start shares no parameter with model by name and shape: "
            f"model has {', '.join(list(params)[:3])}..., start has {', '.join(map(str, list(given)[:3]))}..."
        )
    return points


def _check_pairs(params: Tensors, start: Tensors, strength: float) -> _Selection:
    given, points = collect("params", params), collect("start", start)
    if not given.tensors:
        raise ValueError("params holds no tensors")
    starts = match(given, points)
    seen: dict[int, str] = {}
    fine = all_usable([*given.tensors.values(), *starts])
    for (name, p), p0 in zip(given.tensors.items(), starts, strict=True):
        if not fine:
            check_tensor(given.label(name), p)
            check_tensor(points.label(name), p0)
        if seen.setdefault(id(p), name) is not name:
            raise ValueError(
                f"params holds the same tensor twice: {given.label(seen[id(p)])}, {given.label(name)}"
            )
    names, tensors = list(given.tensors), list(given.tensors.values())
    return _Selection(names, given.label, tensors, list(starts), [strength] * len(names))


def _penalty(selected: _Selection) -> Tensor:
    params, start, strength = selected[2:]
    if not params:
        return torch.zeros(())
    if hides_gradient(params) or (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
        return L2SPFunction.apply(start, strength, *params)
    return l2sp_value_op(params, start, strength)


@torch.no_grad()
def _add_grad_(selected: _Selection, grad_scale: float | Tensor | None) -> Tensor:
    params, start, strength = selected[2:]
    if isinstance(grad_scale, Tensor):
        check_tensor("grad_scale", grad_scale)
        if grad_scale.numel() != 1:
            raise ValueError(
                f"grad_scale must be a number or a one-element tensor, got shape {shape(grad_scale)}"
            )
        scale_tensor = grad_scale if grad_scale.dtype == torch.float64 else grad_scale.float()
        scale = 1.0
    else:
        scale_tensor = None
        scale = 1.0 if grad_scale is None else check_number("grad_scale", grad_scale, 0)
    if not params:
        return torch.zeros(())
    grads: list[Tensor] = []
    accumulate: list[int] = []
    for name, p in zip(selected.names, params, strict=True):
        if not p.is_leaf:
            raise ValueError(
                f"{selected.label(name)} is not a leaf: it keeps no .grad to add to. Use l2sp_penalty"
            )
        g = p.grad
        if g is not None and g.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {selected.label(name)} must be dense (strided), got layout {g.layout}"
            )
        grads.append(torch.empty_like(p) if g is None else g)
        accumulate.append(int(g is not None))
    if not torch.compiler.is_compiling():
        labels = [f"the gradient of {selected.label(name)}" for name in selected.names]
        read = [[p] if p0 is None else [p, p0] for p, p0 in zip(params, start, strict=True)]
        written_once(labels, grads, read, [object() for _ in labels])
    value = l2sp_add_grad_op(params, start, grads, strength, accumulate, scale, scale_tensor)
    for p, g, had in zip(params, grads, accumulate, strict=True):
        if not had:
            p.grad = g
    return value


@torch.no_grad()
def _prox_(selected: _Selection, lr: float) -> None:
    """``(p + h p0)/(1 + h)`` is a blend with ``1/(1 + h)`` on ``p``; without a start point, of ``p`` and nothing."""
    if not torch.compiler.is_compiling():
        labels = [selected.label(name) for name in selected.names]
        rows = [[] if p0 is None else [p0] for p0 in selected.start]
        written_once(labels, selected.params, rows, [object() for _ in labels])
    for has_start in (True, False):
        params, start, strength = selected.part([(p0 is not None) == has_start for p0 in selected.start])[2:]
        if params:
            kept = [1 / (1 + 2 * lr * weight) for weight in strength]
            scale = [] if has_start else [0.0] * len(params)
            blend_inplace_op(params, start if has_start else params, kept, None, scale, None, [1.0])
