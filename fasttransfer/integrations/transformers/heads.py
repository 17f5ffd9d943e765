"""The head of a transformers model, and what stands in for it while a loss takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Of the largest logit: what a softcap in the model's own 16-bit dtype may differ by.
_CLOSE = 0.02


def logits_of(outputs: Any) -> Tensor:
    """Of a model's outputs without a loss: in a dict, first of a tuple, or alone."""
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(f"the model must give logits, got outputs of {', '.join(map(str, outputs))}")
        logits = outputs["logits"]
    else:
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model's logits must be one tensor, got {type(logits).__name__}")
    return logits


def linear_head(side: str, model: nn.Module) -> nn.Linear:
    """The output embeddings of a model.

    Raises:
        ValueError: There are none, or they are no plain linear layer (an adapter, quantized weights).
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        raise ValueError(
            f"fused_head needs the {side}'s get_output_embeddings() to be a plain linear layer, got "
            f"{type(head).__name__}: use fused_head=False"
        )
    return head


@contextmanager
def replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context ``forward`` is called in the place of the head's own: under its hooks, DDP and autocast."""
    own = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def hidden_of(head: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What the head is given while ``run`` calls the model; no product is computed."""
    given: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.new_zeros([1] * hidden.dim())

    with replaced(head, keep):
        run()
    return once(given)


def once(found: list[Tensor]) -> Tensor:
    """The one tensor of a list."""
    if len(found) != 1:
        raise ValueError(
            f"fused_head needs a model that calls its head once, it did {len(found)} times: use fused_head=False"
        )
    return found[0]


@torch.no_grad()
def check_logits(
    side: str, model: nn.Module, head: nn.Linear, run: Callable[[], Any], softcap: float
) -> None:
    """Raise ValueError unless the model's logits are its head's product, softcapped by ``softcap`` if that is not 0.

    Some models scale or cap their logits behind the head, which a loss that takes the place of the head would miss.
    """
    given: list[Tensor] = []
    plain = head.forward

    def keep(hidden: Tensor) -> Tensor:
        given.append(plain(hidden))
        return given[-1].clone()

    training = model.training
    model.eval()
    try:
        with replaced(head, keep):
            found = logits_of(run()).float()
    finally:
        model.train(training)
    product = once(given).float()
    expected = softcap * torch.tanh(product / softcap) if softcap else product
    if found.shape == expected.shape and bool(
        (found - expected).abs().max() <= _CLOSE * expected.abs().max()
    ):
        return
    cap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
    advice = f"pass softcap={cap} in distillation, or use fused_head=False" if cap else "use fused_head=False"
    raise ValueError(f"the {side}'s logits are not what its head gives (a softcap, a scale?): {advice}")
