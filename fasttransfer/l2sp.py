"""The L2-SP penalty: fine-tuning pulled towards its starting point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_number, check_tensor, forward_mode, overlaps_itself, shape
from fasttransfer.names import Tensors, check_patterns, collect, match, matches
from fasttransfer.ops.blend import blend_inplace_op
from fasttransfer.ops.l2sp import L2SPFunction, difference, l2sp_add_grad_op, l2sp_value_op

OptTensors = Sequence[Tensor | None]


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
    tensors, starts = _check_pairs(params, start)
    return _penalty(tensors, starts, [check_number("strength", strength, 0)] * len(tensors))


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
        TypeError, ValueError: As ``l2sp_penalty``; also for a sparse gradient or one whose elements overlap in
            memory. Nothing has been modified then.
    """
    tensors, starts = _check_pairs(params, start)
    weight = check_number("strength", strength, 0)
    trained = [i for i, p in enumerate(tensors) if p.requires_grad]
    return _add_grad_(
        [tensors[i] for i in trained], [starts[i] for i in trained], [weight] * len(trained), grad_scale
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
    tensors, starts = _check_pairs(params, start)
    h = 2 * check_number("lr", lr, 0) * check_number("strength", strength, 0)
    trained = [i for i, p in enumerate(tensors) if p.requires_grad]
    _prox_([tensors[i] for i in trained], [starts[i] for i in trained], [h] * len(trained))


class L2SP(nn.Module):
    """The L2-SP penalty of a model, with its start points.

    ``strength * sum ||p - p0||^2`` over the parameters that have a start point, plus
    ``new_strength * sum ||p||^2`` over those that have none. Start points are clones, part of the ``state_dict`` and
    moved by ``.to()``. The model is not registered as a submodule. Frozen parameters (``requires_grad=False`` at the
    time of the call) are skipped; tied parameters count once.

    Args:
        model: The model that is fine-tuned. Its parameters are looked up once, here.
        strength: The lambda of the old parameters, at least 0.
        start: None: the parameters as they are now. Or a state dict or a module, matched by name and shape: a
            parameter that is missing there, or has another shape there (a replaced head), is a new one.
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
        new_strength: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.strength = check_number("strength", strength, 0)
        self.new_strength = check_number("new_strength", new_strength, 0)
        params = dict(model.named_parameters())
        included = check_patterns("include", include, params)
        excluded = check_patterns("exclude", exclude, params)
        # A plain dict: registered, the parameters would be in this module's state_dict and moved by its .to().
        self._params = {
            name: p
            for name, p in params.items()
            if (not included or matches(name, included)) and not matches(name, excluded)
        }
        for name, p in self._params.items():
            check_tensor(f"model parameter {name!r}", p)
        if not self._params:
            raise ValueError("model has no parameters left to penalise after include and exclude")
        points = _start_points(self._params, start)
        self.start = _StartPoints(points)
        self.new_names = tuple(name for name in self._params if name not in points)

    def forward(self) -> Tensor:
        """The penalty, a scalar that is differentiable in the model's parameters."""
        _, params, starts, strengths = self._active()
        return _penalty(params, starts, strengths)

    def add_grad_(self, *, grad_scale: float | Tensor | None = None) -> Tensor:
        """Add the penalty's gradient to the parameters' ``.grad`` and return the penalty, as ``l2sp_add_grad_``."""
        _, params, starts, strengths = self._active()
        return _add_grad_(params, starts, strengths, grad_scale)

    def prox_(self, lr: float) -> None:
        """The proximal step at step size ``lr``, in place, as ``l2sp_prox_``."""
        _, params, starts, strengths = self._active()
        step = 2 * check_number("lr", lr, 0)
        _prox_(params, starts, [step * strength for strength in strengths])

    @torch.no_grad()
    def distance(self) -> dict[str, Tensor]:
        """``||p - p0||`` per parameter that has a start point, frozen ones included: scalars on their device."""
        return {
            name: torch.linalg.vector_norm(difference(self._params[name], p0))
            for name, p0 in self.start.points().items()
        }

    def extra_repr(self) -> str:
        """Strengths and how many parameters have a start point."""
        old = len(self._params) - len(self.new_names)
        counts = f"with_start={old}, new={len(self.new_names)}"
        return f"strength={self.strength}, new_strength={self.new_strength}, {counts}"

    def _active(self) -> tuple[list[str], list[Tensor], list[Tensor | None], list[float]]:
        """Names, parameters, start points and strengths of what is penalised at this moment."""
        points = self.start.points()
        names: list[str] = []
        params: list[Tensor] = []
        starts: list[Tensor | None] = []
        strengths: list[float] = []
        for name, p in self._params.items():
            p0 = points.get(name)
            if not p.requires_grad or (p0 is None and self.new_strength == 0):
                continue
            if p0 is not None and p0.device != p.device:
                raise ValueError(
                    f"the start point of {name!r} is on {p0.device}, the parameter on {p.device}: call .to() on this "
                    "L2SP as well"
                )
            names.append(name)
            params.append(p)
            starts.append(p0)
            strengths.append(self.new_strength if p0 is None else self.strength)
        return names, params, starts, strengths


class _StartPoints(nn.Module):
    """Start points as buffers in a tree of modules that mirrors the model's names.

    Buffer names cannot hold dots; a tree gives the same keys (``start.layer1.0.weight``), and ``.to()``,
    ``state_dict`` and strict loading work on it as on any module.
    """

    def __init__(self, points: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = tuple(points)
        for name, value in points.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node._modules[part] = nn.Module()
                node = node._modules[part]  # type: ignore[assignment]
            node._buffers[leaf] = value

    def points(self) -> dict[str, Tensor]:
        """The start points by parameter name, as they are now (``.to()`` replaces them)."""
        return {name: t for name, t in self.named_buffers() if t is not None}

    def extra_repr(self) -> str:
        return f"{len(self._names)} start points"

    def __repr__(self) -> str:
        return f"StartPoints({len(self._names)})"


def _start_points(params: Mapping[str, Tensor], start: Any) -> dict[str, Tensor]:
    """Clones of the start points of those parameters that have one."""
    if start is None:
        found = dict(params)
    else:
        if isinstance(start, nn.Module):
            # remove_duplicate=False: a parameter may be tied there under the other of its names.
            given: Mapping[str, Any] = dict(start.named_parameters(remove_duplicate=False))
        elif isinstance(start, Mapping):
            given = start
        else:
            raise TypeError(f"start must be None, a state dict or a module, got {type(start).__name__}")
        found = {
            name: given[name]
            for name, p in params.items()
            if isinstance(given.get(name), Tensor) and given[name].shape == p.shape
        }
        if not found:
            raise ValueError(
                "start shares no parameter with model by name and shape: "
                f"model has {', '.join(list(params)[:3])}..., start has {', '.join(map(str, list(given)[:3]))}..."
            )
    for name, p0 in found.items():
        check_tensor(f"start point of {name!r}", p0)
    return {name: p0.detach().to(params[name].device, copy=True) for name, p0 in found.items()}


def _check_pairs(params: Tensors, start: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    given, points = collect("params", params), collect("start", start)
    if not given.tensors:
        raise ValueError("params holds no tensors")
    starts = match(given, points)
    seen: dict[int, str] = {}
    for (name, p), p0 in zip(given.tensors.items(), starts, strict=True):
        check_tensor(given.label(name), p)
        check_tensor(points.label(name), p0)
        if id(p) in seen:
            raise ValueError(
                f"params holds the same tensor twice: {given.label(seen[id(p)])}, {given.label(name)}"
            )
        seen[id(p)] = name
    return list(given.tensors.values()), starts


def _penalty(params: Sequence[Tensor], start: OptTensors, strength: Sequence[float]) -> Tensor:
    if not params:
        return torch.zeros(())
    if forward_mode() or (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
        return L2SPFunction.apply(start, strength, *params)
    return l2sp_value_op(params, start, strength)


@torch.no_grad()
def _add_grad_(
    params: Sequence[Tensor], start: OptTensors, strength: Sequence[float], grad_scale: float | Tensor | None
) -> Tensor:
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
    for i, p in enumerate(params):
        g = p.grad
        if g is not None:
            if g.layout is not torch.strided:
                raise TypeError(f"the gradient of params[{i}] must be dense (strided), got layout {g.layout}")
            if overlaps_itself(g):
                raise ValueError(
                    f"the gradient of params[{i}] cannot be added to: its elements overlap in memory"
                )
        grads.append(torch.empty_like(p) if g is None else g)
        accumulate.append(int(g is not None))
    value = l2sp_add_grad_op(params, start, grads, strength, accumulate, scale, scale_tensor)
    for p, g, had in zip(params, grads, accumulate, strict=True):
        if not had:
            p.grad = g
    return value


@torch.no_grad()
def _prox_(params: Sequence[Tensor], start: OptTensors, steps: Iterable[float]) -> None:
    """``(p + h p0)/(1 + h)`` is a blend with ``1/(1 + h)`` on ``p``; without a start point, of ``p`` and nothing."""
    steps = list(steps)
    for i, p in enumerate(params):
        if overlaps_itself(p):
            raise ValueError(f"params[{i}] cannot be written: its elements overlap in memory")
    for has_start in (True, False):
        part = [i for i in range(len(params)) if (start[i] is not None) == has_start and steps[i] != 0]
        if not part:
            continue
        targets = [params[i] for i in part]
        sources = [start[i] if has_start else params[i] for i in part]
        kept = [1 / (1 + steps[i]) for i in part]
        scale = [] if has_start else [0.0] * len(part)
        blend_inplace_op(targets, sources, kept, None, scale, None, [1.0])
