"""Knowledge fusion: ``alpha * K_target + (1 - alpha) * T(K_source)`` for tensors, lists, dicts and modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from fasttransfer import fast_lists
from fasttransfer.checks import (
    FLOATS,
    all_usable,
    check_choice,
    check_number,
    check_tensor,
    hides_gradient,
    shape,
)
from fasttransfer.memory import overlaps_itself, written_once
from fasttransfer.names import Collection, Labels, Tensors, by_name, collect, match
from fasttransfer.ops.blend import BlendFunction, blend_inplace_op, blend_op
from fasttransfer.products import Convolved, Product, as_convolved, as_product
from fasttransfer.sharded_params import (
    any_dtensor,
    count_writes,
    parts,
    replicated,
    sum_gradients_over_ranks,
    whole,
)

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
        target: A tensor, a list, a dict or a module of float32, bfloat16, float16 or float64 tensors. DTensors are
            blended part by part, without communication (docs/parallel.md).
        source: The same kind, matched by position, length and shape (list) or by name and shape (dict, module).
            Dtypes may differ from the target's.
        alpha: A number, a one-element tensor (it may require grad, and is not read on the host), or a mapping
            ``{name pattern: alpha}`` for dicts and modules, the first matching glob pattern winning.
        source_scale: As alpha; None means ``1 - alpha``. ``alpha=1, source_scale=1`` is the plain sum.
        transform: What maps a source to the target's shape: None, a matrix ``[d_target, d_source]`` acting on the
            last dimension (as ``F.linear``), a module or function of one tensor (``LinearMap``, ``ConvMap``,
            ``WeightMap``), or a mapping ``{name pattern: transform}`` (a name that no pattern matches is not
            transformed). A matrix, a linear layer, a convolution of kernel size 1 and a ``WeightMap`` are one GEMM with
            the blend (float32 and float64, alpha a number); the output of a larger convolution becomes the result.

    Returns:
        The same kind as ``target`` (a list for a list or tuple), in the targets' dtypes and with their strides'
        order; for a module, a dict of parameters and (without a graph) buffers, for ``torch.func.functional_call``.
        Accumulated in fp32 (fp64 if an operand is), rounded once. Integer and bool entries of dicts, and integer
        buffers, are the target's.

    Raises:
        TypeError: Something that is no floating tensor; alpha by name for tensors without names.
        ValueError: Names, lengths, shapes or devices that do not match; a pattern that matches nothing.
    """
    if source_scale is transform is None and type(alpha) is float and fast_lists.undisturbed():
        outs = fast_lists.lerp(target, source, alpha)
        if outs is not None:
            return outs[0] if isinstance(target, Tensor) else outs
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
    usual = source_scale is transform is None and buffers == "blend" and type(alpha) is float
    if usual and fast_lists.undisturbed() and fast_lists.lerp_or_blend_(target, source, alpha):
        return target
    plan = _Plan(
        target, [source], alpha, source_scale, transform, None, check_choice("buffers", buffers, _BUFFERS)
    )
    with torch.no_grad():
        plan.blend_()
    return target


def blend_many(
    target: Tensors,
    sources: Sequence[Tensors],
    alpha: Coefficient,
    *,
    weights: Sequence[float] | None = None,
    source_scale: Coefficient | None = None,
) -> Any:
    """``alpha * target + source_scale * sum_i w_i source_i`` in one pass for all sources, differentiable.

    Soups average: ``blend_many(a, [b, c], 1 / 3)``. Task vectors are added and subtracted (Ilharco et al., "Editing
    Models with Task Arithmetic" (2023), section 2): ``base + sum_i l_i (tuned_i - base)`` is
    ``blend_many(base, tuned, 1 - sum(l), weights=l, source_scale=1.0)``.

    Args:
        target: As in ``blend``.
        sources: At least one; each as the source of ``blend``.
        alpha: As in ``blend``.
        weights: One number per source (they may be negative); default equal, ``1 / k``. They must sum to 1 unless
            ``source_scale`` is given.
        source_scale: As in ``blend``; None means ``1 - alpha``.

    Returns:
        As ``blend``.

    Raises:
        TypeError, ValueError: As ``blend``; also for weights that do not fit the sources or do not sum to 1.
    """
    plan = _Plan(target, sources, alpha, source_scale, None, weights, "blend")
    return plan.result(plan.blended())


def blend_many_(
    target: Tensors,
    sources: Sequence[Tensors],
    alpha: Coefficient,
    *,
    weights: Sequence[float] | None = None,
    source_scale: Coefficient | None = None,
    buffers: str = "blend",
) -> Any:
    """As ``blend_many``, in place and without a graph; returns ``target``.

    Args:
        target: As in ``blend``; overwritten.
        sources: As in ``blend_many``.
        alpha: As in ``blend``.
        weights: As in ``blend_many``.
        source_scale: As in ``blend_many``.
        buffers: As in ``blend_``; ``"copy"`` needs a single source.

    Raises:
        TypeError, ValueError: As ``blend_`` and ``blend_many``.
    """
    if source_scale is None and buffers == "blend" and type(alpha) is float and fast_lists.undisturbed():
        shares = _check_weights(sources, weights, one=True)
        if fast_lists.blend_(target, sources, alpha, shares):
            return target
    plan = _Plan(
        target, sources, alpha, source_scale, None, weights, check_choice("buffers", buffers, _BUFFERS)
    )
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
        self.weights = _check_weights(sources, weights, one=source_scale is None)
        if buffers == "copy" and len(sources) > 1:
            raise ValueError(f"buffers='copy' needs a single source to copy from, got {len(sources)}")
        self.given = collect("target", target, buffers=True)
        self.split: list[Tensor] = []  # the targets as given, if they or their sources are split over ranks
        self.single = isinstance(target, Tensor)
        named = self.given.named
        everything = list(self.given.tensors)
        arguments = ["source"] if len(sources) == 1 else [f"sources[{j}]" for j in range(len(sources))]
        others = [collect(a, s, buffers=True) for a, s in zip(arguments, sources, strict=True)]
        transforms = by_name("transform", transform, self.given, everything, default=None)
        columns = [match(self.given, other, transformed=transforms) for other in others]
        self.parameters = set(collect("target", target).tensors) if isinstance(target, nn.Module) else None

        constant = not any(isinstance(c, (Tensor, Mapping)) for c in (alpha, source_scale))
        self.names: list[str] = []
        self.targets: list[Tensor] = []
        self.rows: list[list[Tensor]] = []  # the sources of each target
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.products: dict[int, Product | Convolved] = {}  # of targets that are not for the op, by position
        for i, (name, t) in enumerate(self.given.tensors.items()):
            row = [column[i] for column in columns]
            integer = named and not t.dtype.is_floating_point and not t.dtype.is_complex
            is_buffer = integer if self.parameters is None else name not in self.parameters
            if is_buffer and buffers == "copy":
                self.copies.append((t, _copyable(row[0], t, others[0].label(name))))
            elif not integer and not (is_buffer and buffers == "keep"):
                self.names.append(name)
                self.targets.append(t)
                self.rows.append(row)
                if transforms[i] is not None:
                    product: Product | Convolved | None = None
                    if constant:
                        product = as_product(transforms[i], row[0], t)
                    if product is None:
                        mapped = zip(row, others, strict=True)
                        self.rows[-1] = [_mapped(transforms[i], s, t, other, name) for s, other in mapped]
                        if constant:
                            product = as_convolved(transforms[i], self.rows[-1][0], t)
                    if product is not None:
                        self.products[len(self.names) - 1] = product
                        self.rows[-1] = product.reads
        if not all_usable([*self.targets, *(s for row in self.rows for s in row)]):
            for name, t, row in zip(self.names, self.targets, self.rows, strict=True):
                for found, x in zip((self.given, *others), (t, *row), strict=True):
                    check_tensor(found.label(name), x)
        self.alpha, self.alpha_tensor = _coefficients("alpha", alpha, self.given, self.names)
        self.scale, self.scale_tensor = _coefficients("source_scale", source_scale, self.given, self.names)

    def blended(self) -> list[Tensor]:
        """The blended tensors, in the order of ``names``."""
        self._take_parts()
        plain = [i for i in range(len(self.targets)) if i not in self.products]
        outs = {i: product.result(*self._constants(i)) for i, product in self.products.items()}
        targets, sources, args = self._lists(plain)
        if plain:
            inputs = [*targets, *sources]
            coefficients = [t for t in (self.alpha_tensor, self.scale_tensor) if t is not None]
            recording = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *coefficients))
            if recording or hides_gradient((*inputs, *coefficients)):
                results = BlendFunction.apply(len(targets), *args, *inputs)
            else:
                results = blend_op(targets, sources, *args)
            outs.update(zip(plain, results, strict=True))
        done = [outs[i] for i in range(len(self.targets))]
        return list(map(whole, done, self.split)) if self.split else done

    def blend_(self) -> None:
        """Overwrite the targets. The caller enters torch.no_grad: dynamo cannot bind a decorated method here."""
        self._take_parts()
        kept = list(range(len(self.targets)))
        if not is_compiling():
            coefficients = zip(self._shown("alpha"), self._shown("scale"), strict=True)
            labels = Labels(self.given, self.names)
            kept = written_once(labels, self.targets, self.rows, list(coefficients))
        for t, source in self.copies:
            t.copy_(source)
        count_writes(self.split)
        plain = [i for i in kept if i not in self.products]
        if plain:
            targets, sources, args = self._lists(plain)
            blend_inplace_op(targets, sources, *args)
        for i in kept:
            if i in self.products:
                self.products[i].overwrite(*self._constants(i))

    def _take_parts(self) -> None:
        """Of tensors that are split over ranks, what is here."""
        given, rows = self.targets, self.rows
        if not any_dtensor(chain(given, *rows, *self.copies)):
            return
        self.split = given
        labels = [self.given.label(name) for name in self.names]
        flat = [(i, s) for i, row in enumerate(rows) for s in row]
        self.targets = parts(labels, given, labels, given)[0]
        owners, of = [given[i] for i, _ in flat], [f"the source of {labels[i]}" for i, _ in flat]
        here = iter(parts([labels[i] for i, _ in flat], owners, of, [s for _, s in flat])[1])
        self.rows = [[next(here) for _ in row] for row in rows]
        if self.copies:
            buffers, sources = zip(*self.copies, strict=True)
            names = ["a buffer of target"] * len(buffers)
            self.copies = list(zip(*parts(names, buffers, names, sources), strict=True))
        if self.alpha_tensor is not None:
            self.alpha_tensor = sum_gradients_over_ranks(self.alpha_tensor, given)
        if self.scale_tensor is not None:
            self.scale_tensor = sum_gradients_over_ranks(self.scale_tensor, given)

    def _lists(self, kept: Sequence[int]) -> tuple[list[Tensor], list[Tensor], tuple[Any, ...]]:
        """Targets, sources and the other arguments of the op, of those at these positions."""
        every = len(kept) == len(self.targets)

        def part(constants: list[float], tensor: Tensor | None) -> tuple[list[float], Tensor | None]:
            if every:
                return constants, tensor
            return [constants[i] for i in kept] if constants else [], None if tensor is None else tensor[kept]

        args = *part(self.alpha, self.alpha_tensor), *part(self.scale, self.scale_tensor), self.weights
        return [self.targets[i] for i in kept], [s for i in kept for s in self.rows[i]], args

    def _constants(self, i: int) -> tuple[float, float]:
        """Alpha and the scale of the only source of a product."""
        scale = self.scale[i] if self.scale else 1 - self.alpha[i]
        return self.alpha[i], scale * self.weights[0]

    def _shown(self, coefficient: str) -> list[float | None]:
        """Coefficients per target as far as the host knows them."""
        return getattr(self, coefficient) or [None] * len(self.targets)

    def result(self, blended: Sequence[Tensor]) -> Any:
        """The blended tensors as the kind that ``target`` is."""
        if self.single:
            return blended[0]
        if not self.given.named:
            return list(blended)
        new = dict(zip(self.names, blended, strict=True))
        if self.parameters is not None:
            # Buffers stay out of the graph: batch_norm takes no statistics that require grad.
            new = {name: t if name in self.parameters else t.detach() for name, t in new.items()}
        return {name: new[name] if name in new else t.clone() for name, t in self.given.tensors.items()}


def _mapped(transform: Any, source: Tensor, target: Tensor, other: Collection, name: str) -> Tensor:
    """The source, transformed and checked against its target."""
    check_tensor(other.label(name), source)
    if any_dtensor((source, transform)):
        raise ValueError(
            f"{other.label(name)} or its transform is a DTensor: what a transform takes must be whole on every rank, "
            "pass full_tensor() of it (the target may be split)"
        )
    mapped = _apply(transform, source)
    check_tensor(f"the transformed {other.label(name)}", mapped)
    if mapped.shape != target.shape:
        raise ValueError(
            f"the transformed {other.label(name)} has shape {shape(mapped)}, its target has {shape(target)}"
        )
    if mapped.device != target.device:
        raise ValueError(
            f"the transformed {other.label(name)} is on {mapped.device}, its target on {target.device}"
        )
    return mapped


def _copyable(source: Tensor, target: Tensor, where: str) -> Tensor:
    if source.shape != target.shape:
        raise ValueError(f"{where} has shape {shape(source)}, its target has {shape(target)}")
    if source.dtype != target.dtype and not (source.is_floating_point() and target.is_floating_point()):
        raise TypeError(
            f"{where} is {source.dtype}, its target {target.dtype}: a copy would change its values"
        )
    if overlaps_itself(target):
        raise ValueError(
            f"the target of {where} cannot be overwritten: its elements overlap in memory (expanded?)"
        )
    return source


def _apply(transform: Any, source: Tensor) -> Tensor:
    if transform is None:
        return source
    if isinstance(transform, Tensor):
        if transform.dim() != 2 or source.dim() == 0 or transform.shape[1] != source.shape[-1]:
            raise ValueError(
                f"transform must be a matrix [d_target, d_source] for the source's last dimension, got "
                f"{shape(transform)} for a source of shape {shape(source)}"
            )
        if transform.device != source.device:  # F.linear reads what is no memory of a matrix on meta
            raise ValueError(f"transform is on {transform.device}, the source on {source.device}")
        dtype = torch.promote_types(source.dtype, transform.dtype)
        return F.linear(source.to(dtype), transform.to(dtype))
    if not callable(transform):
        raise TypeError(
            f"transform must be None, a matrix, a module or function of one tensor, or a mapping of name patterns, "
            f"got {type(transform).__name__}"
        )
    mapped = transform(source)
    if not isinstance(mapped, Tensor):
        raise TypeError(f"transform must return a tensor, got {type(mapped).__name__}")
    return mapped


def _check_weights(sources: Any, weights: Sequence[float] | None, *, one: bool) -> list[float]:
    """As numbers; ``one``: that sum to 1."""
    if isinstance(sources, (Tensor, Mapping, nn.Module)) or not isinstance(sources, Sequence):
        raise TypeError(f"sources must be a list of sources, got {type(sources).__name__}")
    if not sources:
        raise ValueError("sources must hold at least one source, got none")
    if weights is None:
        return [1 / len(sources)] * len(sources)
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a list of numbers, one per source, got {type(weights).__name__}")
    values = [check_number(f"weights[{i}]", w, float("-inf")) for i, w in enumerate(weights)]
    if len(values) != len(sources):
        raise ValueError(f"weights must be one number per source ({len(sources)}), got {len(values)}")
    if not one:
        return values
    total = sum(values)
    if not abs(total - 1) <= 1e-6:
        raise ValueError(f"weights must sum to 1 without source_scale, got a sum of {total:g}")
    return [w / total for w in values]


def _coefficients(
    argument: str, value: Any, given: Collection, names: Sequence[str]
) -> tuple[list[float], Tensor | None]:
    """One value per blended target: numbers, or a tensor ``[targets]`` as soon as one of them is a tensor."""
    if value is None and argument == "source_scale":
        return [], None
    if isinstance(value, Mapping):
        value = {name: replicated(f"{argument}[{name!r}]", v) for name, v in value.items()}
    value = replicated(argument, value)
    if not isinstance(value, (Tensor, Mapping)):
        return [check_number(argument, value, float("-inf"))] * len(names), None
    values = by_name(argument, value, given, names)
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
    dtype, device = torch.float64 if double else torch.float32, given.tensors[names[0]].device
    if isinstance(value, Tensor):
        return [], value.reshape(1).to(device, dtype).expand(len(names))
    return [], torch.stack([torch.as_tensor(v).reshape(()).to(device, dtype) for v in values])
