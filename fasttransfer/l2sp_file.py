"""Start points that stay in the checkpoint they come from: mapped into memory at use, never kept."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checkpoint_files import BLENDED, Entry, FileVersion, open_checkpoint
from fasttransfer.untraced import untraced


class StartFile(nn.Module):
    """The tensors of a safetensors checkpoint that have a parameter's name and shape.

    Its state is a reference: the path, and a digest of each file's header.

    Args:
        path: A ``.safetensors`` file, an index, or a directory that holds either.
        params: By name; the shapes that count.
        aliases: All names of each parameter.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError, ValueError: As ``open_checkpoint``.
        TypeError: A tensor of integers under a parameter's name.
    """

    def __init__(
        self, path: str | PathLike[str], params: Mapping[str, Tensor], aliases: Mapping[str, list[str]]
    ) -> None:
        super().__init__()
        checkpoint = open_checkpoint("start", Path(path).absolute())
        self._path = str(checkpoint.path)
        self._entries: dict[str, Entry] = {}
        for name, p in params.items():
            found = [e for alias in aliases[name] if (e := checkpoint.find(alias)) and e.shape == p.shape]
            if not found:
                continue
            if not found[0].floating:
                raise TypeError(
                    f"start point of {name!r} must be {', '.join(BLENDED)}, got {found[0].dtype} in {found[0].file}"
                )
            self._entries[name] = found[0]
        self.names_in_file = tuple(checkpoint.tensors)
        used = {entry.file for entry in self._entries.values()}
        self._versions = {shard.path: shard.version for shard in checkpoint.shards if shard.path in used}
        self._headers = {shard.path.name: shard.digest for shard in checkpoint.shards if shard.path in used}

    @untraced  # a memory map
    def tensors(self) -> dict[str, Tensor]:
        """By name: views of the files' pages, which the system reads when they are used and drops when it likes.

        Raises:
            FileNotFoundError, ValueError: A file is gone, or is not the one that was opened first.
        """
        maps = {path: _map(path, version) for path, version in self._versions.items()}
        return {name: _view(maps[entry.file], entry) for name, entry in self._entries.items()}

    def names(self) -> tuple[str, ...]:
        """Of the parameters that have a start point here."""
        return tuple(self._entries)

    def get_extra_state(self) -> dict[str, Any]:
        """The reference."""
        return {"path": self._path, "headers": dict(self._headers)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a reference is to the same files; their path may have changed, and this one's stays.

        Raises:
            ValueError: They have other headers.
        """
        if not isinstance(state, Mapping) or "path" not in state:
            raise ValueError(
                f"the state has no reference to a file of start points, got {type(state).__name__}"
            )
        if state.get("headers") != self._headers:
            raise ValueError(
                f"the state's start points are in {state['path']}, whose tensors are not those of {self._path}"
            )

    def __repr__(self) -> str:
        return f"{len(self._entries)} start points in {self._path}"


def _map(path: Path, version: FileVersion) -> mmap.mmap:
    if FileVersion.of(path) != version:
        raise ValueError(f"{path} has changed since this L2SP was made: its start points are not the same")
    with open(path, "rb") as file:
        # Copy on write, as torch wants memory that could be written; nothing ever is.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _view(pages: mmap.mmap, entry: Entry) -> Tensor:
    dtype = BLENDED[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(pages, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.start)
    return flat.view(entry.shape)
