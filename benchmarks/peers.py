"""Other libraries' code for the same formulas, where they are installed: absent ones are listed, never faked.

Each adapter calls the library's own function and changes nothing but the convention (the factor T^2). Tried with
TRL 1.16, mergekit 0.1.5 and timm 1.0.31; Liger-Kernel, whose kernels need a GPU, has not been tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRL, LIGER = "TRL generalized_jsd_loss", "Liger-Kernel LigerKLDIVLoss"
MERGEKIT, TIMM = "mergekit linear merge", "timm ModelEmaV3"

# Modules that have it, newest layout first, and the attribute.
PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    TRL: (("trl.experimental.gkd", "trl"), "GKDTrainer"),
    LIGER: (("liger_kernel.transformers",), "LigerKLDIVLoss"),
    MERGEKIT: (("mergekit.merge_methods.linear",), "linear_merge"),
    TIMM: (("timm.utils",), "ModelEmaV3"),
}


@cache
def find(name: str) -> tuple[Any, str]:
    """The library's object and why it is not there: one of the two is empty."""
    modules, attribute = PLACES[name]
    why = ""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), attribute), ""
        except ImportError as error:
            why = why or f"{error}".partition("\n")[0]
        except Exception as error:  # a library that breaks at import is as absent
            why = why or f"{type(error).__name__}: {error}".partition("\n")[0]
    return None, why or "not installed"


def absent() -> dict[str, str]:
    """The peers that are not measured here, and why."""
    missing = {name: why for name in PLACES if (why := find(name)[1])}
    if LIGER not in missing and not torch.cuda.is_available():
        missing[LIGER] = "its Triton kernels need a GPU"
    return missing


def kd_losses(teacher: Tensor, temperature: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """`T^2 KL(teacher || student)` by others, as functions of student logits [rows, V]."""
    missing, losses = absent(), {}
    if TRL not in missing:
        trainer = find(TRL)[0]

        def trl(leaf: Tensor) -> Tensor:
            loss = trainer.generalized_jsd_loss(leaf, teacher, beta=0, temperature=temperature)
            return loss * temperature**2

        losses[TRL] = trl
    if LIGER not in missing and teacher.is_cuda:
        divergence = find(LIGER)[0](reduction="batchmean")

        def liger(leaf: Tensor) -> Tensor:
            log_p = F.log_softmax(leaf / temperature, -1)
            return divergence(log_p, F.softmax(teacher / temperature, -1)) * temperature**2

        losses[LIGER] = liger
    return losses


class Parameters(nn.Module):
    """A model that is nothing but its parameters, which are the given tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)


def timm_ema(average: Sequence[Tensor], decay: float) -> Callable[[Sequence[Tensor]], None] | None:
    """timm's EMA, its average on the given memory; a function of the model's tensors, or None where absent."""
    if TIMM in absent():
        return None
    ema = find(TIMM)[0](Parameters(average), decay=decay, use_warmup=False)
    for held, given in zip(ema.module.parameters(), average, strict=True):
        held.data = given
    models: dict[int, nn.Module] = {}

    def update(source: Sequence[Tensor]) -> None:
        if id(source) not in models:
            models[id(source)] = Parameters(source)
        ema.update(models[id(source)])

    return update


def mergekit_merge(
    target: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], alpha: float
) -> Callable[[], None] | None:
    """mergekit's linear merge (its kernel, without its planning) of every tensor, written back; None where absent."""
    if MERGEKIT in absent():
        return None
    from mergekit.merge_methods.base import TensorBatch

    kernel = find(MERGEKIT)[0].implementation
    weights = torch.tensor([[alpha] + [(1.0 - alpha) / len(sources)] * len(sources)])

    def merge() -> None:
        for tensors in zip(target, *sources, strict=True):
            batch = TensorBatch(tuple(t.unsqueeze(0) for t in tensors))
            tensors[0].copy_(kernel(batch, weights, False).squeeze(0))

    return merge
