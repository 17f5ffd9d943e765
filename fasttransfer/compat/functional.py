"""``torch.nn.functional.kl_div`` of two softmaxes, from the logits."""

from __future__ import annotations

from torch import Tensor

from fasttransfer.checks import check_choice, check_number, check_tensor
from fasttransfer.compat.elements import check_same_classes, kl_elements, log_softmax
from fasttransfer.kd import kd_loss
from fasttransfer.kd_arguments import TEMPERATURES, check_logits

_REDUCTIONS = ("mean", "batchmean", "sum", "none")


def kl_div_with_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reduction: str = "mean",
    *,
    temperature: float = 1.0,
    dim: int = -1,
) -> Tensor:
    """``F.kl_div(F.log_softmax(student/T, dim), F.softmax(teacher/T, dim), reduction=reduction)``, in one pass.

    Of ``F.kl_div`` in torch 2.13, its default included: ``"mean"`` divides by the number of *elements*, rows times V,
    and so is V times smaller than the KL; ``"batchmean"`` divides by the first dimension. There is no ``T^2``.

    Args:
        student_logits: Any shape, before ``log_softmax``.
        teacher_logits: The same shape. For ``log_target=True`` pass the log-probabilities: they are logits. For
            targets that are probabilities pass their ``log()``; they are normalised here, which ``F.kl_div`` leaves
            to you.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"`` (per element, of the logits' shape, by
            autograd and without a kernel).
        temperature: Divides both logits.
        dim: Of the classes.

    Raises:
        TypeError, ValueError: As ``fasttransfer.kd_loss``.

    Example:
        >>> loss = kl_div_with_logits(s, t, reduction="batchmean", temperature=4.0) * 4.0**2
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    temperature = check_number("temperature", temperature, *TEMPERATURES)
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    check_same_classes("student_logits", student_logits, "teacher_logits", teacher_logits, dim)
    student, teacher = student_logits.movedim(dim, -1), teacher_logits.movedim(dim, -1)
    if reduction == "none":
        check_logits(student, teacher, None)
        return kl_elements(
            log_softmax(teacher_logits, temperature, dim), log_softmax(student_logits, temperature, dim)
        )
    divisor = {"mean": student_logits.numel(), "batchmean": student_logits.shape[0], "sum": None}[reduction]
    if divisor is None:
        return kd_loss(student, teacher, temperature=temperature, scale_by_t2=False, reduction="sum")
    return kd_loss(student, teacher, temperature=temperature, scale_by_t2=False, num_items=max(divisor, 1))
