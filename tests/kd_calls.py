"""How the tests of kd call it: the loss with its gradient, and the comparison of both with the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttransfer import kd_loss
from tests import oracle


def kd_and_grad(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`kd_loss` and the gradient of its sum. The strides of `student` are kept, its memory is shared."""
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def check_kd(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`kd_and_grad`, after asserting that both are the oracle's to the tolerance of the dtypes, norm-wise.

    Also that evaluation without a gradient gives the same loss, and that shapes and dtypes are the stated ones.
    """
    loss, grad = kd_and_grad(student, teacher, *args, **options)
    exact_loss, exact_grad = oracle.kd(student, teacher, *args, **options)
    double = torch.float64 in (student.dtype, teacher.dtype)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert (grad.shape, grad.dtype) == (student.shape, student.dtype)
    oracle.assert_norm_close(loss, exact_loss)
    oracle.assert_norm_close(grad, exact_grad)
    with torch.no_grad():
        evaluated = kd_loss(student, teacher, *args, **options)
    torch.testing.assert_close(evaluated, loss, rtol=0, atol=0, equal_nan=True)
    return loss, grad
