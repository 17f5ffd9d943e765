"""The same values in different memory: what a kernel over flat runs has to get right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Two dense orders of the dimensions, one that no memory format has, one with gaps, one that starts off alignment.
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A copy of `values` in a layout. Memory around and between its elements holds NaN."""
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "sliced":
        memory = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), math.nan)
        view = memory[..., 1::2]
    else:
        memory = values.new_full((values.numel() + 2,), math.nan)
        view = memory[1:-1].view(values.shape)
    return view.copy_(values)


def surroundings_intact(t: Tensor) -> bool:
    """Whether the memory around and between the elements of `lay_out`'s result still holds NaN."""
    return t._base is None or int(t._base.isnan().sum()) == t._base.numel() - t.numel()
