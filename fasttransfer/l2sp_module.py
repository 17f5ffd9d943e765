"""``L2SP``: the L2-SP penalty of a model, with its start points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttransfer.checks import (
    FLOATS,
    check_choice,
    check_device,
    check_number,
    check_tensor,
    shape,
    values_visible,
)
from fasttransfer.l2sp import Selection, add_grad_of_, penalty_of, prox_of_
from fasttransfer.l2sp_file import StartFile
from fasttransfer.l2sp_sharded import is_split, parts_here
from fasttransfer.names import by_name, check_patterns, collect, matches
from fasttransfer.ops.l2sp import l2sp_value_op
from fasttransfer.ops.library import accumulator
from fasttransfer.sharded_params import is_dtensor, like, reshard, sum_over_ranks
from fasttransfer.tensor_tree import TensorTree, split_name, tree_of


class L2SP(nn.Module):
    """The L2-SP penalty of a model, with its start points.

    ``strength * sum F (p - p0)^2`` over the parameters that have a start point (F = 1 without an importance), plus
    ``new_strength * sum ||p||^2`` over those that have none. Start points are clones, part of the ``state_dict`` and
    moved by ``.to()``. The model is not registered as a submodule. Frozen parameters (``requires_grad=False`` at the
    time of the call) are skipped; tied parameters count once. Parameters may be DTensors (FSDP2: make it after
    ``fully_shard``; docs/parallel.md).

    Args:
        model: The model that is fine-tuned. Which of its parameters are penalised is settled here; they are looked up
            by name at each call, so that ``load_state_dict(assign=True)`` or a replaced layer does not leave this
            module with parameters that nobody trains.
        strength: The lambda of the old parameters, at least 0; or ``{name pattern: lambda}``, the first matching glob
            pattern winning.
        importance: F by parameter name, such as ``fisher_importance`` gives: what is missing there is weighed by 1.
            Cloned, part of the ``state_dict``.
        start: None: the parameters as they are now. Or a state dict or a module, matched by name and shape: a
            parameter that is missing there, or has another shape there (a replaced head), is a new one. Or the path
            of a safetensors file, an index, or a directory that holds either (extra ``checkpoints``), matched
            likewise: nothing is kept in memory, the files' pages are read when they are used, in the files' dtypes.
            The ``state_dict`` then has the path in place of start points, ``.to()`` has nothing to move, and the
            files must stay as they are. ``torch.compile`` breaks the graph there.
        new: Names or glob pattern(s) of parameters that are new ones whatever ``start`` has under their names: a
            replaced head of the old shape, or one in a snapshot. What ``replace_head`` returns will do. All of them
            may be new.
        new_strength: The lambda of the new parameters, at least 0.
        include: Glob pattern(s) over parameter names; only these are penalised. Default: all.
        exclude: Glob pattern(s) over parameter names that are not penalised at all.
        dtype: Of the start points that are kept; None: as given. bfloat16 halves them, at the price of their rounding.
        device: Where start points and importances are kept, ``.to()`` notwithstanding; None: beside the parameters.
            ``"cpu"``, for a model on a GPU: in pinned memory, brought to the GPU in blocks of 64 MiB (or one
            parameter), two at a time, while the one before is used. Make the L2SP when the model is on the GPU.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A negative strength, a pattern that matches nothing, a ``start`` that shares no parameter,
            ``dtype`` or ``device`` beside a path.
        ImportError, FileNotFoundError: A path without safetensors installed; one that leads nowhere.

    With a path, calls raise ValueError where a file has changed since.

    Example:
        >>> reg = L2SP(model, 0.01, start=pretrained.state_dict(), new_strength=0.001)
        >>> (task_loss + reg()).backward()          # through autograd, or, faster:
        >>> task_loss.backward(); reg.add_grad_(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | Mapping[str, float],
        *,
        importance: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | nn.Module | str | PathLike[str] | None = None,
        new: str | Iterable[str] | None = None,
        new_strength: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        by_pattern = isinstance(strength, Mapping)
        self.strength: Any = None if by_pattern else check_number("strength", strength, 0)
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
        home = check_device("device", device)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if isinstance(start, (str, PathLike)):
            if dtype is not None or home is not None:
                raise ValueError(
                    "dtype and device are those of start points that are kept, but start is a path"
                )
            self.start: TensorTree | StartFile = StartFile(start, old, aliases)
            points = {name: old[name] for name in self.start.names()}
            _check_shared(old, points, self.start.names_in_file)
        else:
            points = _start_points(old, aliases, start, dtype, home)
            self.start = tree_of(points, "start points", home)
        self._elsewhere = home is not None or isinstance(self.start, StartFile)
        # In a tuple: registered, the model's parameters would be in this module's state_dict and moved by its .to().
        self._model = (model,)
        self._paths = [(name, *split_name(name)) for name in params]
        self._strengths: dict[str, float] = {}
        if by_pattern:
            values = by_name("strength", strength, found, points)
            self._strengths = {
                n: check_number(f"strength of {n!r}", v, 0) for n, v in zip(points, values, strict=True)
            }
        self.importance = tree_of(_importances(points, aliases, importance), "importances", home)
        self.new_names = tuple(name for name in params if name not in points)

    def forward(self) -> Tensor:
        """The penalty, a scalar that is differentiable in the model's parameters."""
        return penalty_of(self._active())

    def add_grad_(self, *, grad_scale: float | Tensor | None = None, over_ranks: bool = True) -> Tensor:
        """Add the penalty's gradient to the parameters' ``.grad`` and return the penalty, as ``l2sp_add_grad_``.

        Of parameters that are split over ranks (docs/parallel.md) the penalty takes one all-reduce of one number;
        ``over_ranks=False`` returns what is on this rank of it, and nothing is exchanged.
        """
        return add_grad_of_(self._active(), grad_scale, over_ranks=over_ranks)

    def prox_(self, lr: float) -> None:
        """The proximal step at step size ``lr``, in place, as ``l2sp_prox_``."""
        prox_of_(self._active(), check_number("lr", lr, 0))

    def attach(self, optimizer: torch.optim.Optimizer, *, by: str = "auto") -> RemovableHandle:
        """Let every ``optimizer.step()`` apply the penalty, by hooks; returns a handle whose ``remove()`` ends it.

        Under a ``GradScaler`` gradients are unscaled by then, and a step that it skips applies nothing. Clipping that
        happens before the step does not see the penalty's gradient, and ``by="grad"`` comes to nothing where backward
        runs inside of the step (``optimizer.step(closure)``): call ``add_grad_for_`` at the end of the closure.

        Args:
            optimizer: Whose parameters' penalty is applied; the step size is its groups' ``lr``.
            by: ``"grad"``: ``add_grad_`` before each step. ``"prox"``: ``prox_`` after it. ``"auto"``: the gradient
                for ``torch.optim.SGD``, which takes it as it is; the proximal step for all others, which would rescale
                it (Adam divides it by the task gradient's size), and for one that maximizes.

        Raises:
            TypeError, ValueError: Not an optimizer, another ``by``, none of the penalised parameters in it;
                ``by="grad"`` for one with ``maximize=True``, which would climb the penalty.
        """
        way = self.way(optimizer, by)
        own = {id(p) for p in self.parameters_of_model()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer has none of the parameters that this L2SP penalises")

        def before(*_: Any) -> None:
            # A fused optimizer unscales gradients itself: a GradScaler leaves it the scale while it steps.
            scale = getattr(optimizer, "grad_scale", None)
            self.add_grad_for_(optimizer, grad_scale=scale, over_ranks=False)  # nobody looks at the penalty

        def after(*_: Any) -> None:
            self.prox_for_(optimizer)

        if way == "grad":
            return optimizer.register_step_pre_hook(before)
        return optimizer.register_step_post_hook(after)

    def way(self, optimizer: torch.optim.Optimizer, by: str = "auto") -> str:
        """``"grad"`` or ``"prox"``: what ``attach`` does for this optimizer. Errors as there."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        climbs = any(group.get("maximize", False) for group in optimizer.param_groups)
        if check_choice("by", by, ("auto", "grad", "prox")) == "grad" and climbs:
            raise ValueError(
                "by='grad' is for optimizers that minimize, got one with maximize=True, which would climb the penalty "
                "too: use by='prox'"
            )
        if by != "auto":
            return by
        return "grad" if isinstance(optimizer, torch.optim.SGD) and not climbs else "prox"

    def add_grad_for_(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        grad_scale: float | Tensor | None = None,
        over_ranks: bool = True,
    ) -> Tensor:
        """``add_grad_`` for those of the penalised parameters that are in ``optimizer``."""
        active, sizes = self._active(), _step_sizes(optimizer)
        active = active.part([id(p) in sizes for p in active.params])
        return add_grad_of_(active, grad_scale, over_ranks=over_ranks)

    def prox_for_(self, optimizer: torch.optim.Optimizer) -> None:
        """``prox_`` for those of the penalised parameters that are in ``optimizer``, with its groups' ``lr``.

        Nothing where it is a fused optimizer in a step that its GradScaler has it skip (which waits for the device).
        """
        if skipped_by_scaler(optimizer):
            return
        active, sizes = self._active(), _step_sizes(optimizer)
        active = active.part([id(p) in sizes for p in active.params])
        prox_of_(active, [sizes[id(p)] for p in active.params])

    def parameters_of_model(self) -> list[Tensor]:
        """The parameters that are penalised, frozen ones included, as they are in the model now."""
        return list(self._params().values())

    @torch.no_grad()
    def distance(self) -> dict[str, Tensor]:
        """``||p - p0||`` per parameter that has a start point, frozen ones included: scalars on their device."""
        started = self._selection(lambda _, p0: p0 is not None)
        owners, split = started.params, is_split(started)
        started = parts_here(started) if split else started
        found: list[Tensor] = []
        for run, points, _ in started.here():
            rows = zip(started.params[run], points, strict=True)
            found += [l2sp_value_op([p], [p0], [1.0], []).sqrt() for p, p0 in rows]
        if split:
            squares = torch.stack([norm.to(accumulator(norm)).square() for norm in found])
            norms = sum_over_ranks(squares, owners).sqrt()
            found = [norm.to(mine.dtype) for norm, mine in zip(norms, found, strict=True)]
        return dict(zip(started.names, found, strict=True))

    def extra_repr(self) -> str:
        """Strengths and how many parameters have a start point."""
        counts = f"with_start={len(self._paths) - len(self.new_names)}, new={len(self.new_names)}"
        strength = self.strength if self.strength is not None else "by name"
        return f"strength={strength}, new_strength={self.new_strength}, {counts}"

    def _params(self) -> dict[str, Tensor]:
        """The model's parameters as they are now, by name."""
        (model,) = self._model
        reshard(model)
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

    def _active(self) -> Selection:
        """What is penalised at this moment."""
        return self._selection(lambda p, p0: p.requires_grad and (p0 is not None or self.new_strength != 0))

    def _selection(self, wanted: Callable[[Tensor, Tensor | None], bool]) -> Selection:
        """Those of the parameters that are ``wanted``, as they are now."""
        points, importances = self.start.tensors(), self.importance.tensors()
        found = Selection([], "parameter {!r}".format, [], [], [], [])
        away = False
        for name, p in self._params().items():
            p0, f = points.get(name), importances.get(name)
            if not wanted(p, p0):
                continue
            if p0 is not None and p0.shape != p.shape:
                raise ValueError(
                    f"the start point of {name!r} has shape {shape(p0)}, the parameter now {shape(p)}"
                )
            if p0 is not None and (p0.device != p.device or (f is not None and f.device != p.device)):
                if not self._elsewhere:
                    raise ValueError(
                        f"the start point of {name!r} is on {p0.device}, the parameter on {p.device}: call .to() on "
                        "this L2SP as well"
                    )
                away = True
            found.names.append(name)
            found.params.append(p)
            found.start.append(p0)
            old = self._strengths.get(name, self.strength)
            found.strength.append(self.new_strength if p0 is None else old)
            if importances:
                found.importance.append(f)
        return found._replace(away=away)


def skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """In a hook of ``optimizer.step``: whether it is a fused optimizer that a GradScaler has do nothing.

    Others are not called at all then. Waits for the device where it is a fused one under a GradScaler.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _step_sizes(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _start_points(
    params: Mapping[str, Tensor],
    aliases: Mapping[str, list[str]],
    start: Any,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Clones of the start points of those parameters that have one, under any of a tied parameter's names."""
    if start is None:
        given: Mapping[str, Any] = params
    elif isinstance(start, (nn.Module, Mapping)):
        given = collect("start", start).aliases if isinstance(start, nn.Module) else start
    else:
        raise TypeError(f"start must be None, a state dict, a module or a path, got {type(start).__name__}")
    points: dict[str, Tensor] = {}
    for name, p in params.items():
        for alias in aliases[name]:
            p0 = given.get(alias)
            if isinstance(p0, Tensor) and p0.shape == p.shape:
                check_tensor(f"start point of {alias!r}", p0)
                if device is not None and is_dtensor(p):
                    raise ValueError(
                        f"parameter {name!r} is split over ranks: its start point is kept beside it, not on {device}"
                    )
                p0 = like(f"parameter {name!r}", p, f"start point of {alias!r}", p0)
                points[name] = p0.detach().to(p.device if device is None else device, dtype, copy=True)
                break
    _check_shared(params, points, given)
    return points


def _check_shared(params: Mapping[str, Tensor], points: Mapping[str, Tensor], given: Iterable[Any]) -> None:
    if params and not points:
        raise ValueError(
            "start shares no parameter with model by name and shape: "
            f"model has {', '.join(list(params)[:3])}..., start has {', '.join(map(str, list(given)[:3]))}..."
        )


def _importances(
    points: Mapping[str, Tensor], aliases: Mapping[str, list[str]], importance: Any
) -> dict[str, Tensor]:
    """Clones of the importances of the parameters that have a start point, under any of a tied parameter's names."""
    if importance is None:
        return {}
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance must be a dict by parameter name, got {type(importance).__name__}")
    check_patterns("importance", tuple(importance), [n for name in points for n in aliases[name]])
    found = {}
    for name, p0 in points.items():
        f = next((importance[alias] for alias in aliases[name] if alias in importance), None)
        if f is None:
            continue
        check_tensor(f"importance[{name!r}]", f)
        if f.shape != p0.shape:
            raise ValueError(f"importance[{name!r}] has shape {shape(f)}, the parameter {shape(p0)}")
        if values_visible(f) and bool((f < 0).any()):
            raise ValueError(f"importance[{name!r}] must be at least 0, got {f.min().item():g}")
        f = like(f"parameter {name!r}", p0, f"importance[{name!r}]", f)
        found[name] = f.detach().to(p0.device, copy=True)
    return found
