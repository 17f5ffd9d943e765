"""Decoupled knowledge distillation: ``decoupled_kd_loss`` and ``DecoupledKDLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fasttransfer.checks import check_number
from fasttransfer.kd import distill_rows
from fasttransfer.kd_arguments import TEMPERATURES, NumItems, Options, check_options


def _check_options(
    target_weight: float, nontarget_weight: float, label_weight: float, *options: Any
) -> Options:
    weights = (
        check_number("target_weight", target_weight, 0),
        check_number("nontarget_weight", nontarget_weight, 0),
    )
    checked = check_options(check_number("label_weight", label_weight, 0, 1), *options)
    return checked._replace(divergence="decoupled", divergence_args=weights)


def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: NumItems | None = None,
    scale_by_t2: bool = True,
    standardize: bool = False,
    softcap: float | Sequence[float | None] | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    group: Any = None,
) -> Any:
    r"""Decoupled distillation: the label's mass and the other classes' shares, weighted apart.

    Per row, at temperature T, with ``b = (p_y, 1 - p_y)`` the mass of the label y and of the rest, and ``p'`` the
    softmax over the other classes (``b_t``, ``q'`` the teacher's)::

        D = target_weight * KL(b_t || b) + nontarget_weight * KL(q' || p')
        loss = label_weight * CE(student, y) + (1 - label_weight) * T^2 * D

    Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), eq. 7, where target_weight is alpha and
    nontarget_weight is beta (1 and 8 in the authors' settings for CIFAR-100; with ``(1, 1 - q_y)`` D is the plain KL).
    The mass beside the label is summed as such: neither a label that has all of it nor one that has none loses
    digits, and no logit is replaced by -1000.

    Args:
        student_logits: ``[..., V]``, as in ``kd_loss``.
        teacher_logits: ``[..., V]``, as in ``kd_loss``.
        labels: ``[...]`` int64 class indices. Rows labelled ``ignore_index`` are not read.
        temperature: As in ``kd_loss``.
        target_weight: alpha, at least 0.
        nontarget_weight: beta, at least 0.
        label_weight: Weight of the cross entropy in [0, 1], as in ``kd_loss``; here 0 unless it is given.
        ignore_index: As in ``kd_loss``.
        label_smoothing: As in ``kd_loss``; of the cross entropy.
        row_weight: As in ``kd_loss``.
        vocab_size: As in ``kd_loss``.
        reduction: As in ``kd_loss``.
        num_items: As in ``kd_loss``.
        scale_by_t2: As in ``kd_loss``.
        standardize: As in ``kd_loss``.
        softcap: As in ``kd_loss``.
        inplace: As in ``kd_loss``.
        return_stats: As in ``kd_loss``; its ``kl`` is the plain KL(q || p).
        group: As in ``kd_loss``.

    Returns:
        As ``kd_loss``.

    Special values: as in ``kd_loss``. A teacher without mass beside the label has no non-target part.

    Raises:
        TypeError, ValueError, RuntimeError: As ``kd_loss``.

    Example:
        >>> loss = decoupled_kd_loss(student(x), teacher_logits, y, temperature=4.0)
    """
    if labels is None:
        raise TypeError(
            "labels must be a tensor: decoupled distillation tells the label's class from the others"
        )
    options = _check_options(
        target_weight, nontarget_weight, label_weight, ignore_index, "skip", label_smoothing, vocab_size, reduction,
        scale_by_t2, inplace, "forward_kl", 0.5, standardize, softcap, return_stats, group,
    )  # fmt: skip
    return distill_rows(student_logits, teacher_logits, labels, temperature, row_weight, num_items, options)


class DecoupledKDLoss(nn.Module):
    """``decoupled_kd_loss`` as a module: the options once, the tensors per batch.

    Args:
        temperature: As in ``decoupled_kd_loss``; a number here, which a call may replace.
        target_weight: As in ``decoupled_kd_loss``.
        nontarget_weight: As in ``decoupled_kd_loss``.
        label_weight: As in ``decoupled_kd_loss``.
        ignore_index: As in ``kd_loss``.
        label_smoothing: As in ``kd_loss``.
        vocab_size: As in ``kd_loss``.
        reduction: As in ``kd_loss``.
        scale_by_t2: As in ``kd_loss``.
        standardize: As in ``kd_loss``.
        softcap: As in ``kd_loss``.
        inplace: As in ``kd_loss``.
        return_stats: As in ``kd_loss``.
        group: As in ``kd_loss``.

    Raises:
        TypeError, ValueError: As ``kd_loss``, at construction for the options given here.

    Example:
        >>> criterion = DecoupledKDLoss(temperature=4.0)
        >>> loss = criterion(student(x), teacher_logits, y)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        target_weight: float = 1.0,
        nontarget_weight: float = 8.0,
        label_weight: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        scale_by_t2: bool = True,
        standardize: bool = False,
        softcap: float | Sequence[float | None] | None = None,
        inplace: bool = False,
        return_stats: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, *TEMPERATURES)
        self.options = _check_options(
            target_weight, nontarget_weight, label_weight, ignore_index, "skip", label_smoothing, vocab_size,
            reduction, scale_by_t2, inplace, "forward_kl", 0.5, standardize, softcap, return_stats, group,
        )  # fmt: skip

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        temperature: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Any:
        """Of one batch; ``temperature=None`` means the module's."""
        if labels is None:
            raise TypeError(
                "labels must be a tensor: decoupled distillation tells the label's class from the others"
            )
        if temperature is None:
            temperature = self.temperature
        return distill_rows(
            student_logits, teacher_logits, labels, temperature, row_weight, num_items, self.options
        )

    def extra_repr(self) -> str:
        """The temperature, the two weights, and every other option that differs from its default."""
        target, nontarget = self.options.divergence_args
        shown = [
            f"temperature={self.temperature}",
            f"target_weight={target}",
            f"nontarget_weight={nontarget}",
        ]
        defaults = _check_options(1.0, 8.0, 0.0, -100, "skip", 0.0, None, "mean", True, False)
        given = zip(self.options._fields, self.options, defaults, strict=True)
        shown += [f"{n}={v!r}" for n, v, default in given if v != default and n != "divergence_args"]
        return ", ".join(shown)
