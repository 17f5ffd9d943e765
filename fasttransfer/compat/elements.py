"""Divergences per element ``[..., V]``, of log-probabilities, by autograd: where a loss must not be summed over V.

A column without mass on either side is 0 with a gradient of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """In float32, or float64 for float64 logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim)


def kl_elements(y: Tensor, x: Tensor) -> Tensor:
    """``exp(y) (y - x)``, whose sum over V is KL(y || x)."""
    empty = y == -torch.inf
    # Neither the value nor the gradient may meet 0 * inf.
    difference = torch.where(empty, 0.0, y) - torch.where(empty, 0.0, x)
    return y.exp() * difference


def jsd_elements(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """``beta KL(y || m) + (1-beta) KL(x || m)``, ``m = beta y + (1-beta) x``; at the ends KL(y || x) and KL(x || y)."""
    if beta in (0, 1):
        return kl_elements(y, x) if beta == 0 else kl_elements(x, y)
    neither = (x == -torch.inf) & (y == -torch.inf)
    a, b = torch.where(neither, 0.0, x), torch.where(neither, 0.0, y)
    m = torch.logaddexp(b + math.log(beta), a + math.log1p(-beta))
    return torch.where(neither, 0.0, beta * kl_elements(b, m) + (1 - beta) * kl_elements(a, m))
