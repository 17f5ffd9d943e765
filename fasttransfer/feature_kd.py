"""Distillation from features: ``feature_kd_loss`` and ``FeatureKDLoss``, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_choice, check_tensor, shape
from fasttransfer.kd_arguments import NumItems, Options, check_num_items, check_options

_LOSSES = ("mse", "cosine")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Choices(NamedTuple):
    """What does not change from batch to batch, checked."""

    loss: str
    dim: int | None
    reduction: Options


def feature_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    loss: str = "mse",
    dim: int | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: NumItems | None = None,
) -> Tensor:
    r"""How far the student's features, carried to the teacher's width, are from the teacher's.

    A row is one feature vector: a token of ``[batch, tokens, D]``, a position of a feature map ``[N, C, H, W]``. Per
    row, with ``r = transform(student)`` and ``u`` the teacher's, D numbers each:

    ========== ============================== ==========================================================================
    loss       per row                        source
    ========== ============================== ==========================================================================
    ``mse``    ``sum (r - u)^2 / D``          the hint loss of FitNets (Romero et al. 2015, eq. 3), there
                                              ``||u - r||^2 / 2`` summed over a sample: ``D/2`` times this one's
                                              ``reduction="sum"``. Here as people compute it: with ``"mean"`` it is
                                              ``F.mse_loss(r, u)``
    ``cosine`` ``1 - <r, u> / (|r| |u|)``     DistilBERT (Sanh et al. 2019), section 2; in [0, 2]
    ========== ============================== ==========================================================================

    Args:
        student_features: Float32, bfloat16, float16 or float64, of the shape that ``transform`` takes.
        teacher_features: The same shape as the transformed student's, same device; its dtype may differ. Where it
            requires a gradient it gets one, as in ``kd_loss``: compute the teacher under ``torch.no_grad()``.
        transform: From the student's features to the teacher's, any module or function; its parameters get
            gradients. The maps of this package go from a source to a target, and here the student is the source:
            ``LinearMap(student width, teacher width)``, ``ConvMap(student channels, teacher channels)``, whose
            ``fit(student_features, teacher_features)`` is a start in closed form. None: the widths are the same.
        loss: ``"mse"`` or ``"cosine"``.
        dim: The dimension of the D features behind the transform. None: 1 if ``transform`` is a convolution
            (``ConvMap``), else the last one. Say 1 for feature maps ``[N, C, H, W]`` without a convolution.
        row_weight: A weight per row (float, integer or bool, so that a mask will do), of the transformed features'
            shape without ``dim``; default 1. What comes out of the transform in a row of weight 0 is not used.
        reduction: ``"mean"``: ``sum_i w_i loss_i / sum_i w_i``. ``"batchmean"``: the sum divided by the first
            dimension. ``"sum"``. ``"none"``: a loss per row, weighted.
        num_items: Replaces the divisor of ``"mean"`` or ``"batchmean"`` (gradient accumulation, data parallelism): a
            number or a one-element tensor.

    Returns:
        A float32 tensor, float64 if either side is: sums are in that type, whatever the features are. If no row is
        counted, exactly 0 with a zero gradient.

    Special values: under ``"cosine"`` a row in which one side is 0 throughout has no direction: it costs 1, with a
    gradient of 0. Rows of any finite size neither overflow nor underflow there.

    Raises:
        TypeError: An argument of the wrong type or dtype, a transform that gives no tensor.
        ValueError: Shapes, devices or options that do not fit.

    Example:
        >>> hint = LinearMap(384, 768)                       # trained with the student
        >>> loss = feature_kd_loss(student_hidden, teacher_hidden, transform=hint)
        >>> loss = feature_kd_loss(student_hidden, teacher_hidden, transform=hint, row_weight=attention_mask)
    """
    return _feature_rows(
        student_features, teacher_features, transform, row_weight, num_items, _check(loss, dim, reduction)
    )


class FeatureKDLoss(nn.Module):
    """``feature_kd_loss`` as a module that holds the transform: give its parameters to the optimizer.

    Args:
        transform: As in ``feature_kd_loss``; where it is a module, it is a submodule.
        loss: As in ``feature_kd_loss``.
        dim: As in ``feature_kd_loss``.
        reduction: As in ``feature_kd_loss``.

    Raises:
        TypeError, ValueError: As ``feature_kd_loss``, at construction for the options given here.

    Example:
        >>> criterion = FeatureKDLoss(ConvMap(64, 256), loss="cosine")
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()])
        >>> loss = criterion(student_maps, teacher_maps)
    """

    def __init__(
        self,
        transform: Callable[[Tensor], Tensor] | None = None,
        *,
        loss: str = "mse",
        dim: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_transform(transform)
        self.transform = transform
        self.options = _check(loss, dim, reduction)

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        *,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Tensor:
        """The loss of one batch; arguments as in ``feature_kd_loss``."""
        return _feature_rows(
            student_features, teacher_features, self.transform, row_weight, num_items, self.options
        )

    def extra_repr(self) -> str:
        """Every option, of which there are three."""
        loss, dim, options = self.options
        return f"loss={loss!r}, dim={dim}, reduction={options.reduction!r}"


def _check(loss: str, dim: int | None, reduction: str) -> _Choices:
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim must be an integer or None, got {dim!r}")
    options = check_options(None, -100, "skip", 0.0, None, reduction, True, False)
    return _Choices(check_choice("loss", loss, _LOSSES), dim, options)


def _check_transform(transform: Any) -> None:
    if transform is not None and not callable(transform):
        raise TypeError(
            f"transform must be a module or function of the student's features, got {type(transform).__name__}"
        )


def _feature_rows(
    student: Tensor,
    teacher: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    choices: _Choices,
) -> Tensor:
    """Check what a batch brings, then compute."""
    check_tensor("student_features", student)
    check_tensor("teacher_features", teacher)
    _check_transform(transform)
    name = "student_features" if transform is None else "the transformed student_features"
    mapped = student if transform is None else transform(student)
    check_tensor(name, mapped)
    _check_shapes(name, student, mapped, teacher, transform is None)
    dim = choices.dim
    if dim is None:
        dim = 1 if isinstance(transform, _CONVOLUTIONS) and mapped.dim() > 1 else -1
    if not -mapped.dim() <= dim < mapped.dim():
        raise ValueError(f"dim must be a dimension of the features {shape(mapped)}, got {dim}")
    mapped, teacher = mapped.movedim(dim, -1), teacher.movedim(dim, -1)  # [..., D]
    if mapped.shape[-1] == 0:
        raise ValueError(f"features must have at least one number per row, got {shape(mapped)} with D last")
    if choices.reduction.reduction == "batchmean" and mapped.dim() == 1:
        raise ValueError("reduction='batchmean' needs features with a first dimension beside D, got one row")
    weight = None if row_weight is None else _check_weight(row_weight, mapped)
    items, items_tensor = check_num_items(num_items, mapped, False, choices.reduction)

    double = torch.float64 in (mapped.dtype, teacher.dtype)
    r, u = (x.double() if double else x.float() for x in (mapped, teacher))
    if weight is not None:
        # Before anything is computed of them: a NaN times a gradient of 0 would be a NaN.
        counted = (weight != 0)[..., None]
        r, u = torch.where(counted, r, 0.0), torch.where(counted, u, 0.0)
    rows = (r - u).square().mean(-1) if choices.loss == "mse" else _cosine(r, u)
    divisor = items[0] if items else items_tensor
    return _reduce(rows, weight, divisor, choices.reduction.reduction)


def _check_shapes(name: str, student: Tensor, mapped: Tensor, teacher: Tensor, bare: bool) -> None:
    if mapped.device != teacher.device:
        raise ValueError(f"teacher_features is on {teacher.device}, {name} on {mapped.device}")
    if mapped.dim() == 0 or mapped.shape != teacher.shape:
        hint = (
            "; a LinearMap or ConvMap as transform= carries them to the teacher's width"
            if bare
            else f" (of student_features {shape(student)})"
        )
        raise ValueError(
            f"{name} and teacher_features must have the same shape, got {shape(mapped)} and {shape(teacher)}{hint}"
        )


def _check_weight(weight: Tensor, features: Tensor) -> Tensor:
    """As float32 or float64 ``[...]``; ``features`` are ``[..., D]``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"row_weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype.is_complex or weight.layout is not torch.strided or weight.is_nested:
        raise TypeError(f"row_weight must be a real dense tensor, got {weight.dtype}, {weight.layout}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("row_weight requires grad, but it is a constant here: pass row_weight.detach()")
    if weight.shape != features.shape[:-1]:
        raise ValueError(
            f"row_weight must have a weight per row of the features, {list(features.shape[:-1])}, got {shape(weight)}"
        )
    if weight.device != features.device:
        raise ValueError(f"row_weight is on {weight.device}, the features on {features.device}")
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _cosine(r: Tensor, u: Tensor) -> Tensor:
    """1 - cos of rows: half the squared distance of the directions, which loses no digits where they agree."""
    a, has_a = _direction(r)
    b, has_b = _direction(u)
    both = has_a & has_b
    return torch.where(both, 0.5 * torch.where(both[..., None], a - b, 0.0).square().sum(-1), 1.0)


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and which rows have one. NaN and infinity have a direction, which is NaN."""
    # The squares of what is scaled by its largest neither overflow nor vanish; a direction does not know its scale.
    scale = x.detach().abs().amax(-1, keepdim=True)
    has = scale != 0
    scaled = torch.where(has, x / torch.where(has, scale, 1.0), 1.0)
    return scaled / scaled.square().sum(-1, keepdim=True).sqrt(), has[..., 0]


def _reduce(rows: Tensor, weight: Tensor | None, divisor: float | Tensor | None, reduction: str) -> Tensor:
    """Of losses and weights ``[...]``."""
    first = rows.shape[0] if rows.dim() else 1
    if weight is not None:
        weight = weight.to(rows.dtype)
        rows = torch.where(weight != 0, rows, 0.0) * weight
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if divisor is None:
        if reduction == "batchmean":
            return total / max(first, 1)
        if weight is None:
            return total / max(rows.numel(), 1)
        weights = weight.sum()
        return total / torch.where(weights != 0, weights, 1.0)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(rows.dtype).reshape(())
    return total / divisor
