"""How the tests of linear_kd call it, and the comparison with whole logits in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer import linear_kd_loss
from tests import distill_oracle
from tests.oracle import norm_error

# Norm-wise, of loss and gradients. In 16 bits logits and their gradients are rounded on the way, as F.linear does.
BOUNDS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class Sides(NamedTuple):
    """The six tensors; those of the student are leaves that require grad."""

    student_hidden: Tensor
    student_head: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor | None

    def trained(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None and x.requires_grad]


def sides(
    *leading: int,
    vocab: int = 40,
    widths: tuple[int, int] = (12, 9),
    dtype: torch.dtype = torch.float64,
    teacher_dtype: torch.dtype | None = None,
    teacher_vocab: int | None = None,
    bias: bool = True,
) -> Sides:
    """Random; logits of scale 1."""
    made = []
    dtypes, vocabs = (dtype, teacher_dtype or dtype), (vocab, teacher_vocab or vocab)
    for width, kind, columns in zip(widths, dtypes, vocabs, strict=True):
        tensors = (
            torch.randn(*leading, width),
            torch.randn(columns, width) * width**-0.5,
            torch.randn(columns),
        )
        made += [x.to(kind) for x in tensors[: 3 if bias else 2]] + [None] * (not bias)
    for x in made[:3]:
        if x is not None:
            x.requires_grad_()
    return Sides(*made)


def call(given: Sides, labels: Tensor | None = None, **options: Any) -> Any:
    """linear_kd_loss of all six."""
    return linear_kd_loss(
        given.student_hidden, given.student_head, given.teacher_hidden, given.teacher_head, labels,
        student_bias=given.student_bias, teacher_bias=given.teacher_bias, **options,
    )  # fmt: skip


def logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """In float64."""
    made = hidden.detach().double() @ head.detach().double().T
    return made if bias is None else made + bias.detach().double()


def exact(
    given: Sides, labels: Tensor | None = None, upstream: Any = 1.0, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and gradients of ``sum(upstream * loss)`` for hidden states, head and bias, in float64."""
    for name in ("chunk_rows", "accum_dtype"):
        options.pop(name, None)
    s, t = logits(*given[:3]), logits(*given[3:])
    found = distill_oracle.distill(s, t, labels, **options)
    g = found.student_grad * (upstream[..., None] if isinstance(upstream, Tensor) else upstream)
    hidden, head = (x.detach().double() for x in given[:2])
    g2 = g.reshape(-1, g.shape[-1])
    grads = [g @ head, g2.T @ hidden.reshape(-1, hidden.shape[-1]), g2.sum(0)]
    return found.loss, [
        x for x, of in zip(grads, given[:3], strict=True) if of is not None and of.requires_grad
    ]


def check(
    given: Sides,
    labels: Tensor | None = None,
    upstream: Any = 1.0,
    bound: float | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of ``sum(upstream * loss)``, after asserting that they are exact to the bound."""
    loss = call(given, labels, **options)
    grads = torch.autograd.grad((loss * upstream).sum(), given.trained())
    exact_loss, exact_grads = exact(given, labels, upstream, **options)
    bound = bound or max(BOUNDS[given.student_head.dtype], BOUNDS[given.teacher_head.dtype])
    assert norm_error(loss, exact_loss) <= bound
    for x, grad, exact_grad in zip(given.trained(), grads, exact_grads, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        assert norm_error(grad, exact_grad) <= bound, f"gradient of {list(x.shape)}"
    with torch.no_grad():
        evaluated = call(given, labels, **options)
    torch.testing.assert_close(evaluated, loss.detach(), rtol=1e-6, atol=1e-7)
    return loss.detach(), list(grads)
