"""``lora_penalty``: L2-SP of a low-rank adapter, from its factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_number, check_tensor, shape


def lora_penalty(
    adapters: nn.Module | Iterable[tuple[Tensor, Tensor, float]], strength: float, *, adapter: str = "default"
) -> Tensor:
    r"""``strength * sum ||W - W0||^2`` where ``W - W0 = c B A``, without ever forming it.

    With low-rank adapters (Hu et al., "LoRA" (2021), eq. 3) the distance to the start point is the adapter itself, so
    no start point is stored, and ``||c B A||^2 = c^2 sum((B^T B) * (A A^T))``, two r x r Gram matrices:
    ``2 r^2 (d_in + d_out)`` operations in place of ``2 r d_in d_out``. Differentiable, also twice.

    Args:
        adapters: Triples ``(A [r, d_in], B [d_out, r], c)``. Or a module in which layers of peft's kind are looked
            for: those with ``lora_A``, ``lora_B`` and ``scaling`` that hold ``adapter`` (linear and embedding
            layers; a convolution's factors count as matrices). DoRA layers, whose magnitude is trained too, are
            refused.
        strength: The lambda, at least 0.
        adapter: The name of the adapter in such layers.

    Returns:
        A scalar, float32 (float64 if any factor is); Gram matrices of 16-bit factors are computed in float32.

    Raises:
        TypeError: Something that is no floating tensor, or no triple.
        ValueError: Ranks that differ, a negative strength, a module without such layers.
    """
    weight = check_number("strength", strength, 0)
    if isinstance(adapters, (Tensor, str, Mapping)) or not isinstance(adapters, (nn.Module, Iterable)):
        raise TypeError(
            f"adapters must be triples (A, B, scaling) or a module, got {type(adapters).__name__}"
        )
    triples = list(_of_module(adapters, adapter) if isinstance(adapters, nn.Module) else adapters)
    if not triples:
        raise ValueError(
            f"adapters holds no layer with lora_A, lora_B and scaling for the adapter {adapter!r}"
            if isinstance(adapters, nn.Module)
            else "adapters holds no triple (A, B, scaling)"
        )
    total: Any = 0
    for i, triple in enumerate(triples):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3:
            raise TypeError(
                f"adapters[{i}] must be a triple (A [r, d_in], B [d_out, r], scaling), got {type(triple).__name__}"
            )
        a, b, scaling = triple
        check_tensor(f"adapters[{i}][0]", a)
        check_tensor(f"adapters[{i}][1]", b)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"adapters[{i}] must be A [r, d_in] and B [d_out, r], got {shape(a)} and {shape(b)}"
            )
        c = check_number(f"adapters[{i}][2]", scaling, float("-inf"))
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        with torch.autocast(a.device.type, enabled=False):  # it would multiply in 16 bits
            a, b = a.to(dtype), b.to(dtype)
            total = total + (weight * c * c) * ((b.T @ b) * (a @ a.T)).sum()
    return total


def _of_module(module: nn.Module, adapter: str) -> Iterator[tuple[Tensor, Tensor, float]]:
    for name, layer in module.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or adapter not in scaling:
            continue
        if adapter in (getattr(layer, "lora_magnitude_vector", None) or {}):
            raise ValueError(f"{name!r} is a DoRA layer: W - W0 is not its low-rank product")
        for kind in ("lora_A", "lora_embedding_A"):
            factors = getattr(layer, kind, None)
            if factors is None or adapter not in factors:
                continue
            a, b = _factor(factors[adapter]), _factor(getattr(layer, kind.replace("_A", "_B"))[adapter])
            # An embedding's factors are parameters A [r, vocabulary] and B [width, r]; a convolution's have a kernel.
            yield a.flatten(1), b.flatten(1), float(scaling[adapter])


def _factor(layer: Any) -> Tensor:
    weight = layer if isinstance(layer, Tensor) else layer.weight
    return weight
