"""Checkpoints in the safetensors format: what is in their files, and how a new file is laid out.

A file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype, shape and
place; ``__metadata__``), and the data without gaps: https://github.com/huggingface/safetensors. The library vets every
file; its writer is not used, as it takes all tensors of a file at once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLENDED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COPIED = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_SIZES = {**{name: dtype.itemsize for name, dtype in BLENDED.items()}, **_COPIED}
INDEX_SUFFIX = ".safetensors.index.json"


class FileVersion(NamedTuple):
    """What tells a file from an edited one."""

    nbytes: int
    time: int  # of its last change, ns

    @staticmethod
    def of(path: Path) -> FileVersion:
        """The version that is there now."""
        stat = path.stat()
        return FileVersion(stat.st_size, stat.st_mtime_ns)


class Entry(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int  # of its first byte in the file
    nbytes: int

    @property
    def floating(self) -> bool:
        """Whether it can be blended."""
        return self.dtype in BLENDED

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shard(NamedTuple):
    """One safetensors file."""

    path: Path
    metadata: dict[str, str] | None
    entries: list[Entry]  # in the order of their data
    version: FileVersion
    digest: str  # of its header


class Checkpoint(NamedTuple):
    """One file, or the files that an index names."""

    argument: str
    path: Path  # as given
    shards: list[Shard]
    tensors: dict[str, Entry]
    aliases: dict[str, str]  # names without a tensor of their own (tied ones) -> the name that has it
    index_file: Path | None

    def find(self, name: str) -> Entry | None:
        """The tensor of this name, its own or the one that it is tied to."""
        return self.tensors.get(self.aliases.get(name, name))

    def names_of(self, name: str) -> list[str]:
        """All names of a tensor."""
        return [name, *(alias for alias, kept in self.aliases.items() if kept == name)]

    @property
    def folder(self) -> Path | None:
        """The directory that is this checkpoint; None for one file."""
        return None if self.path.is_file() and self.index_file is None else self.shards[0].path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(entry.nbytes for entry in self.tensors.values())


def safetensors() -> Any:
    """The library, imported when it is needed.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install 'fasttransfer[checkpoints]'") from error
    return safetensors


def open_checkpoint(argument: str, path: str | PathLike[str]) -> Checkpoint:
    """Read the headers of a ``.safetensors`` file, of an index, or of a directory that holds either.

    Raises:
        FileNotFoundError: There is no such file, or a shard of the index is missing.
        ValueError: Something else than a sound checkpoint.
    """
    if sys.byteorder != "little":
        raise ValueError("checkpoints are little-endian, this machine is not")
    path = Path(path)
    main = _main_file(argument, path)
    if not main.name.endswith(INDEX_SUFFIX):
        shards, index = [_read_shard(main)], None
        tensors = {entry.name: entry for entry in shards[0].entries}
    else:
        index = main
        shards, tensors = _read_index(main)
    declared = [item for shard in shards for item in (shard.metadata or {}).items()]
    aliases = {name: kept for name, kept in declared if kept in tensors and name not in tensors}
    return Checkpoint(argument, path, shards, tensors, aliases, index)


def _main_file(argument: str, path: Path) -> Path:
    if path.is_file():
        if not path.name.endswith((".safetensors", INDEX_SUFFIX)):
            raise ValueError(f"{argument} must be .safetensors, got {path}")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}: there is no {path}")
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = indices or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)}: {', '.join(f.name for f in files[:4])}" if files else "none"
        what = "index" if indices else "safetensors file, or an index of several"
        raise ValueError(f"{argument}: {path} must hold one {what}, got {found}")
    return files[0]


def _read_index(path: Path) -> tuple[list[Shard], dict[str, Entry]]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
    if not (names and plain):
        raise ValueError(f"{path} must name files beside it, got {', '.join(map(repr, names[:4])) or 'none'}")
    for name in names:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is not there")
    shards = [_read_shard(path.parent / name) for name in names]
    found = {(entry.name, shard.path.name): entry for shard in shards for entry in shard.entries}
    wrong = sorted(set(weight_map.items()) ^ set(found))
    if wrong:
        name, file = wrong[0]
        what = f"{file} has {name!r}, of which the index does not know"
        if (name, file) not in found:
            what = f"{file} lacks {name!r}"
        raise ValueError(f"{path} does not fit its files: {what} ({len(wrong)} such)")
    return shards, {name: found[name, file] for name, file in weight_map.items()}


def _read_shard(path: Path) -> Shard:
    library = safetensors()
    version = FileVersion.of(path)
    try:
        with library.safe_open(path, framework="pt"):
            pass  # it has checked the header and the file's size
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    fields: dict[str, Any] = json.loads(header)
    metadata = fields.pop(
        "__metadata__", None
    )  # in the file's order; the library's is another one at each call
    entries = []
    for name, field in fields.items():
        start, stop = field["data_offsets"]
        entry = Entry(name, field["dtype"], tuple(field["shape"]), path, 8 + length + start, stop - start)
        entries.append(entry)
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    return Shard(path, metadata, entries, version, hashlib.sha256(header).hexdigest())


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[tuple[str, int]]]:
    """The beginning of a file of these tensors (name, dtype, shape), and where in it each has its data.

    Returns:
        Length and header, padded with spaces to 8 bytes; names and positions in the order of the data: the widest
        dtypes first, so that all are aligned, otherwise as given.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor[1]])
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = [], 0
    for name, dtype, shape in ordered:
        start, end = end, end + prod(shape) * ITEM_SIZES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        starts.append((name, start))
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    begin = len(header).to_bytes(8, "little") + header
    return begin, [(name, len(begin) + start) for name, start in starts]
