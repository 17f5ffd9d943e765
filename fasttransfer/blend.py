"""Knowledge fusion: ``alpha * K_target + (1 - alpha) * T(K_source)`` for tensors, lists, dicts and modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttransfer.checks import (
    FLOATS,
    check_choice,
    check_number,
    check_tensor,
    forward_mode,
    overlaps_itself,
    shape,
)
from fasttransfer.names import Tensors, by_name, collect, match
from fasttransfer.ops.blend import BlendFunction, blend_inplace_op, blend_op

Coefficient = float | Tensor | Mapping[str, float | Tensor]
Transform = Tensor | Callable[[Tensor], Tensor] | Mapping[str, Any] | None

_BUFFERS = ("blend", "copy", "keep")


def blend(
    target: Tensors,
    source: Tensors,
    alpha: Coefficient,
    *,
    source_scale: Coefficient | None = None,
    transform: Transform = None,
) -> Any:
    """``alpha * target + source_scale * T(source)``, differentiable in target, source, alpha and transform.

    ``alpha`` weighs the target: 1 leaves it unchanged, 0 gives ``T(source)``. Linear interpolation of weights as in
    model soups and WiSE-FT (Wortsman et al. 2022, eq. 1, whose alpha is ``1 - alpha`` here).

    Args:
        target: A tensor, a list, a dict or a module of float32, bfloat16, float16 or float64 tensors.
        source: The same kind, matched by position, length and shape (list) or by name and shape (dict, module).
            Dtypes may differ from the target's.
        alpha: A number, a one-element tensor (it may require grad, and is not read on the host), or a mapping
            ``{name pattern: alpha}`` for dicts and modules, the first matching glob pattern winning.
        source_scale: As alpha; None means ``1 - alpha``. ``alpha=1, source_scale=1`` is the plain sum.
        transform: What maps a source to the target's shape: None, a matrix ``[d_target, d_source]`` acting on the
            last dimension (as ``F.linear``), a module or function of one tensor, or a mapping
            ``{name pattern: transform}`` (a name that no pattern matches is not transformed).

    Returns:
        The same kind as ``target`` (a list for a list or tuple), in the targets' dtypes and with their strides'
        order; for a module, a dict of parameters and buffers for ``torch.func.functional_call``. Accumulated in fp32
        (fp64 if an operand is), rounded once. Integer and bool entries of dicts, and integer buffers, are the
        target's.

    Raises:
        TypeError: Something that is no floating tensor; alpha by name for tensors without names.
        ValueError: Names, lengths, shapes or devices that do not match; a pattern that matches nothing.
    """
    plan = _Plan(target, [source], alpha, source_scale, transform, None, "blend")
    return plan.result(plan.blended())


def blend_(
    target: Tensors,
    source: Tensors,
    alpha: Coefficient,
    *,
    source_scale: Coefficient | None = None,
    transform: Transform = None,
    buffers: str = "blend",
) -> Any:
    """``target = alpha * target + source_scale * T(source)`` in place and without a graph; returns ``target``.

    Args:
        target: As in ``blend``; overwritten.
        source: As in ``blend``.
        alpha: As in ``blend``.
        source_scale: As in ``blend``.
        transform: As in ``blend``.
        buffers: What happens to a module's buffers: ``"blend"`` blends floating ones and keeps integer ones,
            ``"copy"`` copies all from the source, ``"keep"`` keeps all. Integers are never averaged; integer entries
            of a dict follow this as well (``"blend"`` keeps them).

    Raises:
        TypeError, ValueError: As ``blend``; also for a target whose elements overlap in memory, or that shares
            memory with a source in another layout. Nothing has been modified then.
    """
    plan = _Plan(
        target, [source], alpha, source_scale, transform, None, check_choice("buffers", buffers, _BUFFERS)
    )
    with torch.no_grad():
        plan.blend_()
    return target


def blend_many(
    target: Tensors, sources: Sequence[Tensors], alpha: Coefficient, *, weights: Sequence[float] | None = None
) -> Any:
    """``alpha * target + (1 - alpha) * sum_i w_i source_i`` in one pass for all sources, differentiable.

    Args:
        target: As in ``blend``.
        sources: At least one; each as the source of ``blend``.
        alpha: As in ``blend``.
        weights: One number per source, summing to 1 (they may be negative); default equal.

    Returns:
        As ``blend``.

    Raises:
        TypeError, ValueError: As ``blend``; also for weights that do not fit the sources or do not sum to 1.
    """
    plan = _Plan(target, sources, alpha, None, None, weights, "blend")
    return plan.result(plan.blended())


def blend_many_(
    target: Tensors,
    sources: Sequence[Tensors],
    alpha: Coefficient,
    *,
    weights: Sequence[float] | None = None,
    buffers: str = "blend",
) -> Any:
    """As ``blend_many``, in place and without a graph; returns ``target``.

    Args:
        target: As in ``blend``; overwritten.
        sources: As in ``blend_many``.
        alpha: As in ``blend``.
        weights: As in ``blend_many``.
        buffers: As in ``blend_``; ``"copy"`` needs a single source.

    Raises:
        TypeError, ValueError: As ``blend_`` and ``blend_many``.
    """
    plan = _Plan(target, sources, alpha, None, None, weights, check_choice("buffers", buffers, _BUFFERS))
    with torch.no_grad():
        plan.blend_()
    return target


class _Plan:
    """The checked arguments: what is blended, what is copied, and (all the rest) what is kept."""

    def __init__(
        self,
        target: Tensors,
        sources: Sequence[Tensors],
        alpha: Coefficient,
        source_scale: Coefficient | None,
        transform: Transform,
        weights: Sequence[float] | None,
        buffers: str,
    ) -> None:
        self.weights = _check_weights(sources, weights)
        if buffers == "copy" and len(sources) > 1:
            raise ValueError(f"buffers='copy' needs a single source to copy from, got {len(sources)}")
        self.given = collect("target", target, buffers=True)
        self.is_module = isinstance(target, nn.Module)
        self.single = isinstance(target, Tensor)
        named = self.given.named
        arguments = ["source"] if len(sources) == 1 else [f"sources[{j}]" for j in range(len(sources))]
        others = [collect(a, s, buffers=True) for a, s in zip(arguments, sources, strict=True)]
        # With a transform, shapes are compared behind it.
        columns = [match(self.given, other, shapes=transform is None) for other in others]
        transforms = by_name("transform", transform, list(self.given.tensors), named, default=None)
        parameters = (
            {name for name, _ in target.named_parameters()} if isinstance(target, nn.Module) else None
        )

        self.names: list[str] = []
        self.targets: list[Tensor] = []
        self.rows: list[list[Tensor]] = []  # the sources of each target
        self.copies: list[tuple[Tensor, Tensor]] = []
        for i, (name, t) in enumerate(self.given.tensors.items()):
            row = [column[i] for column in columns]
            integer = named and not t.dtype.is_floating_point and not t.dtype.is_complex
            is_buffer = integer if parameters is None else name not in parameters
            if is_buffer and buffers == "copy":
                self.copies.append((t, row[0]))
            elif not integer and not (is_buffer and buffers == "keep"):
                check_tensor(self.given.label(name), t)
                self.names.append(name)
                self.targets.append(t)
                self.rows.append(
                    [_mapped(transforms[i], s, t, o.label(name)) for s, o in zip(row, others, strict=True)]
                )
        self.alpha, self.alpha_tensor = _coefficients("alpha", alpha, self.names, named, self.targets)
        self.scale, self.scale_tensor = _coefficients(
            "source_scale", source_scale, self.names, named, self.targets
        )

    def blended(self) -> list[Tensor]:
        """The blended tensors, in the order of ``names``."""
        if not self.targets:
            return []
        inputs = [*self.targets, *(s for row in self.rows for s in row)]
        coefficients = [t for t in (self.alpha_tensor, self.scale_tensor) if t is not None]
        args = self.alpha, self.alpha_tensor, self.scale, self.scale_tensor, self.weights
        recording = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *coefficients))
        if recording or forward_mode():
            return list(BlendFunction.apply(len(self.targets), *args, *inputs))
        return list(blend_op(self.targets, inputs[len(self.targets) :], *args))

    def blend_(self) -> None:
        """Overwrite the targets. The caller enters torch.no_grad: dynamo cannot bind a decorated method here."""
        kept = list(range(len(self.targets)))
        if not torch.compiler.is_compiling():
            kept = _written_once(self.names, self.targets, self.rows)
        for t, source in self.copies:
            t.copy_(source)
        if not kept:
            return
        blend_inplace_op(
            [self.targets[i] for i in kept],
            [s for i in kept for s in self.rows[i]],
            [self.alpha[i] for i in kept] if self.alpha else [],
            None if self.alpha_tensor is None else self.alpha_tensor[kept],
            [self.scale[i] for i in kept] if self.scale else [],
            None if self.scale_tensor is None else self.scale_tensor[kept],
            self.weights,
        )

    def result(self, blended: Sequence[Tensor]) -> Any:
        """The blended tensors as the kind that ``target`` is."""
        if self.single:
            return blended[0]
        if not self.given.named:
            return list(blended)
        new = dict(zip(self.names, blended, strict=True))
        return {name: new[name] if name in new else t.clone() for name, t in self.given.tensors.items()}


def _mapped(transform: Any, source: Tensor, target: Tensor, where: str) -> Tensor:
    """The source, transformed and checked against its target."""
    check_tensor(where, source)
    mapped = _apply(transform, source)
    if mapped.shape != target.shape:
        how = "" if transform is None else ", transformed,"
        raise ValueError(f"{where}{how} has shape {shape(mapped)}, its target has {shape(target)}")
    check_tensor(where, mapped)
    return mapped


def _apply(transform: Any, source: Tensor) -> Tensor:
    if transform is None:
        return source
    if isinstance(transform, Tensor):
        if transform.dim() != 2 or source.dim() == 0 or transform.shape[1] != source.shape[-1]:
            raise ValueError(
                f"transform must be a matrix [d_target, d_source] for the source's last dimension, got "
                f"{shape(transform)} for a source of shape {shape(source)}"
            )
        return F.linear(source, transform)
    if not callable(transform):
        raise TypeError(
            f"transform must be None, a matrix, a module or function of one tensor, or a mapping of name patterns, "
            f"got {type(transform).__name__}"
        )
    mapped = transform(source)
    if not isinstance(mapped, Tensor):
        raise TypeError(f"transform must return a tensor, got {type(mapped).__name__}")
    return mapped


def _check_weights(sources: Any, weights: Sequence[float] | None) -> list[float]:
    if isinstance(sources, (Tensor, Mapping, nn.Module)) or not isinstance(sources, Sequence):
        raise TypeError(f"sources must be a list of sources, got {type(sources).__name__}")
    if not sources:
        raise ValueError("sources must hold at least one source, got none")
    if weights is None:
        return [1 / len(sources)] * len(sources)
    values = [check_number(f"weights[{i}]", w, float("-inf")) for i, w in enumerate(weights)]
    if len(values) != len(sources):
        raise ValueError(f"weights must be one number per source ({len(sources)}), got {len(values)}")
    total = sum(values)
    if not abs(total - 1) <= 1e-6:
        raise ValueError(f"weights must sum to 1, got a sum of {total:g}")
    return [w / total for w in values]


def _coefficients(
    argument: str, value: Any, names: Sequence[str], named: bool, targets: Sequence[Tensor]
) -> tuple[list[float], Tensor | None]:
    """One value per target: numbers, or a tensor ``[targets]`` as soon as one of them is a tensor."""
    if value is None:
        return [], None
    values = by_name(argument, value, names, named)
    if not any(isinstance(v, Tensor) for v in values):
        return [check_number(argument, v, float("-inf")) for v in values], None
    for v in values:
        if not isinstance(v, Tensor):
            check_number(argument, v, float("-inf"))
        elif v.numel() != 1 or v.dtype not in FLOATS:
            raise ValueError(
                f"{argument} must be a number or a one-element floating tensor, got shape {shape(v)} of {v.dtype}"
            )
    double = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in values)
    dtype, device = torch.float64 if double else torch.float32, targets[0].device
    if isinstance(value, Tensor):
        return [], value.reshape(1).to(device, dtype).expand(len(targets))
    return [], torch.stack([torch.as_tensor(v).reshape(()).to(device, dtype) for v in values])


def _written_once(
    names: Sequence[str], targets: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]
) -> list[int]:
    """Which targets to write: all, but tied ones once. Several threads write, so memory may have one writer only.

    Raises:
        ValueError: A target that overlaps itself, tied targets with different sources, a source that lies in the
            memory of a target otherwise than as that target itself.
    """
    seen: dict[Any, int] = {}
    kept = []
    for i, t in enumerate(targets):
        if overlaps_itself(t):
            raise ValueError(
                f"target {names[i]} cannot be overwritten: its elements overlap in memory (expanded?)"
            )
        key = _view(t)
        if t.numel() and key in seen:
            if [_view(s) for s in rows[i]] != [_view(s) for s in rows[seen[key]]]:
                raise ValueError(
                    f"targets {names[seen[key]]} and {names[i]} are the same memory, but their sources differ"
                )
            continue
        seen[key] = i
        kept.append(i)
    written = {t.untyped_storage().data_ptr() for t in targets if t.numel()}
    for i in kept:
        for s in rows[i]:
            if s.numel() and s.untyped_storage().data_ptr() in written and _view(s) != _view(targets[i]):
                raise ValueError(
                    f"target {names[i]} cannot be overwritten: a source shares memory with the targets; pass a clone"
                )
    return kept


def _view(t: Tensor) -> Any:
    return t.data_ptr(), t.dtype, t.shape, t.stride()
