"""Tensors under dotted names as the buffers of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.sharded_params import is_dtensor, like


class TensorTree(nn.Module):
    """Buffers in a tree of modules that mirrors dotted names.

    Buffer names cannot hold dots; a tree gives the same keys (``layer1.0.weight``), and ``.to()``, ``state_dict`` and
    strict loading work on it as on any module.
    """

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        super().__init__()
        self._names, self._what = tuple(tensors), what
        for name, value in tensors.items():
            path, leaf = split_name(name)
            node: nn.Module = self
            for part in path.split(".") if path else ():
                if part not in node._modules:
                    node._modules[part] = nn.Module()
                node = node._modules[part]  # type: ignore[assignment]
            node._buffers[leaf] = value

    def tensors(self) -> dict[str, Tensor]:
        """By name, in the order given, as they are now (``.to()`` replaces them)."""
        found = dict(self.named_buffers())
        return {name: found[name] for name in self._names}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes, of what is whole in the state and split over ranks here, this rank's part."""
        for name, own in self.tensors().items():
            key = prefix + name
            x = state_dict.get(key)
            if is_dtensor(own) and isinstance(x, Tensor) and not is_dtensor(x) and x.shape == own.shape:
                state_dict[key] = like(key, own, f"{key} of the state", x)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{len(self._names)} {self._what}"


class HeldTree(TensorTree):
    """A tree that stays on its device: ``.to()`` converts the dtype only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda t: _on(fn(t), t), recurse)


def _on(converted: Tensor, t: Tensor) -> Tensor:
    if converted.device != t.device:
        converted = t.to(converted.dtype)
    return converted.pin_memory() if t.is_pinned() and not converted.is_pinned() else converted


def tree_of(tensors: Mapping[str, Tensor], what: str, device: torch.device | None) -> TensorTree:
    """A tree that moves with ``.to()``; given a device, where the tensors are, one that stays there.

    On the CPU that is pinned memory, if CUDA is in use: only from such memory does a copy run beside computation.
    """
    if device is None:
        return TensorTree(tensors, what)
    pinned = device.type == "cpu" and torch.cuda.is_initialized()
    return HeldTree({name: t.pin_memory() for name, t in tensors.items()} if pinned else tensors, what)


def split_name(name: str) -> tuple[str, str]:
    """A dotted name as its module's path and its own last part."""
    path, _, leaf = name.rpartition(".")
    return path, leaf
