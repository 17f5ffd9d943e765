"""Tensors under dotted names as the buffers of a module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


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

    def __repr__(self) -> str:
        return f"{len(self._names)} {self._what}"


def split_name(name: str) -> tuple[str, str]:
    """A dotted name as its module's path and its own last part."""
    path, _, leaf = name.rpartition(".")
    return path, leaf
