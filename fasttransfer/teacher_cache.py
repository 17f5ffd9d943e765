"""A teacher's outputs on disk, for distillation without the teacher: ``TeacherCacheWriter`` and ``TeacherCache``.

Kept per row are the k largest log-probabilities of the full softmax and their columns: with 16-bit values 4 bytes per
entry for a vocabulary of up to 65536, 6 beyond. ``topk_kd_loss`` takes them with any tail.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer.checks import check_choice, check_count, check_tensor, shape
from fasttransfer.progress import Bar, progress_bar

_VERSION = 1
_META = "teacher_cache.json"
_FIELDS = frozenset({"version", "k", "vocab_size", "dtype", "fingerprint", "shards"})
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Logits per chunk of top_k_log_probs: in fp32 its temporaries are a few times this.
_CHUNK_LOGITS = 1 << 22


class TopK(NamedTuple):
    """The k largest log-probabilities of rows, and their columns."""

    values: Tensor  # [..., k]
    indices: Tensor  # [..., k] int64


@torch.no_grad()
def top_k_log_probs(logits: Tensor, k: int) -> TopK:
    """The k largest log-probabilities per row, of the softmax over all columns, and their columns.

    Computed in fp32 (fp64 for fp64 logits), a few rows at a time: nothing of the size of ``logits`` is made.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64.
        k: In [1, V].

    Returns:
        ``(values, indices)``, ``[..., k]``: fp32 (or fp64) values in falling order, int64 indices. A column of -inf has
        the value -inf, which ``topk_kd_loss`` takes as no entry.

    Raises:
        TypeError, ValueError: Another dtype, no columns, or k out of range.
    """
    check_tensor("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V], got {shape(logits)}")
    columns = logits.shape[-1]
    if check_count("k", k) > columns:
        raise ValueError(f"k must be at most the {columns} columns of logits, got {k}")
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits.reshape(-1, columns) if logits.dim() != 2 else logits
    values = torch.empty(len(flat), k, dtype=compute, device=logits.device)
    indices = torch.empty(len(flat), k, dtype=torch.int64, device=logits.device)
    step = max(1, _CHUNK_LOGITS // columns)
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        part = flat[rows].to(compute)
        top, indices[rows] = part.topk(k, dim=-1)
        values[rows] = top - part.logsumexp(-1, keepdim=True)
    leading = logits.shape[:-1]
    return TopK(values.reshape(*leading, k), indices.reshape(*leading, k))


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a teacher cache needs safetensors: pip install fasttransfer[cache]") from error
    return safetensors.torch


def _index_dtype(vocab_size: int) -> torch.dtype:
    """The smallest type that holds every column."""
    return torch.uint16 if vocab_size <= 1 << 16 else torch.int32


def _wide(indices: Tensor) -> Tensor:
    """As int64. 16 bits are handled as int16: few operations of torch know uint16."""
    return indices.to(torch.int64) & 0xFFFF if indices.dtype == torch.int16 else indices.to(torch.int64)


def _shard(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


class TeacherCacheWriter:
    """Writes a teacher's k largest log-probabilities, row by row, into a folder of safetensors files.

    Use it as a context manager, give it the outputs batch by batch, in the order in which they are to be read. What is
    written is complete at any time: files of ``shard_rows`` rows, each renamed into place when it is whole. A run that
    was interrupted goes on behind the last of them: ``len(writer)`` says at its start how many rows are there, and
    the rows after those are what it has to be given.

    Args:
        folder: Created if it is not there. If it holds a cache, its k, vocab_size, dtype and fingerprint must be these.
        k: Entries per row.
        vocab_size: V, the columns that the teacher has (or the first of them that count).
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``, of the values. fp16 is off by up to 0.1% of
            a probability e^-2 and 0.4% of e^-8, bf16 by eight times that.
        fingerprint: What the rows are of: a name of the teacher, the data and their order, say. Another one in the
            folder, or for the reader, is an error.
        shard_rows: Rows per file.
        total: How many rows will be written, for the progress bar.
        progress: Whether to show a progress bar on stderr. Default: if rich is installed and stderr is a terminal.

    Raises:
        TypeError, ValueError: Arguments of the wrong type or range, or that differ from the cache in the folder.
        ImportError: safetensors is not installed (``pip install fasttransfer[cache]``).

    Example:
        >>> with TeacherCacheWriter("cache", k=64, vocab_size=32000, fingerprint="teacher-7b/train-v1") as cache:
        ...     for x in loader_from(len(cache)):
        ...         cache.add(teacher(x))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        k: int,
        vocab_size: int,
        dtype: torch.dtype = torch.float16,
        fingerprint: str = "",
        shard_rows: int = 65536,
        total: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self._library = _safetensors()
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        self.k, self.vocab_size = check_count("k", k), check_count("vocab_size", vocab_size, 2)
        if self.k > self.vocab_size:
            raise ValueError(f"k must be at most vocab_size={vocab_size}, got {k}")
        if not isinstance(fingerprint, str):
            raise TypeError(f"fingerprint must be a string, got {type(fingerprint).__name__}")
        self.dtype, self.fingerprint = dtype, fingerprint
        self._index_dtype = _index_dtype(vocab_size)
        self.shard_rows = check_count("shard_rows", shard_rows)
        self.folder = Path(folder)
        self._bar: Bar | None = None
        self._total, self._progress = total, progress
        self._display: Any = None
        self._open = False
        self._held: list[TopK] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards: list[int] = self._resume()

    def __len__(self) -> int:
        """The rows so far: those in complete files, and those given since."""
        return sum(self._shards) + self._held_rows

    @property
    def _held_rows(self) -> int:
        return sum(len(held.values) for held in self._held)

    def __enter__(self) -> TeacherCacheWriter:
        """Show the progress bar."""
        self._display = progress_bar(self._total, "teacher cache", self._progress)
        self._bar = self._display.__enter__()
        self._bar.advance(len(self))
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Write what is left, as a shorter file; after an exception too, so that nothing computed is lost."""
        try:
            self._write(everything=True)
        finally:
            self._open = False
            self._display.__exit__(kind, error, trace)

    def add(self, logits: Tensor) -> None:
        """The teacher's logits ``[..., V]`` of some rows; columns from ``vocab_size`` on are cut off."""
        check_tensor("logits", logits)
        if logits.dim() == 0 or logits.shape[-1] < self.vocab_size:
            raise ValueError(
                f"logits must have vocab_size={self.vocab_size} columns or more, got {shape(logits)}"
            )
        self.add_top_k(*top_k_log_probs(logits[..., : self.vocab_size], self.k))

    def add_top_k(self, values: Tensor, indices: Tensor) -> None:
        """Log-probabilities ``[..., k]`` of the full softmax and their columns, as an inference server gives them."""
        if not self._open:
            raise RuntimeError("the cache is not open: `with TeacherCacheWriter(...) as cache:`")
        check_tensor("values", values)
        check_tensor("indices", indices, (torch.int32, torch.int64), "int32 or int64")
        if values.shape != indices.shape or values.dim() == 0 or values.shape[-1] != self.k:
            raise ValueError(
                f"values and indices must be [..., {self.k}], got {shape(values)} and {shape(indices)}"
            )
        values = values.detach().reshape(-1, self.k).to("cpu", self.dtype, copy=True)
        indices = indices.detach().reshape(-1, self.k).cpu()
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < self.vocab_size):
            raise ValueError(
                f"indices must be in [0, {self.vocab_size}), got {int(indices.min())} to {int(indices.max())} (an "
                "entry that does not exist has the value -inf)"
            )
        self._held.append(TopK(values, indices.to(torch.int32, copy=True)))
        self._write(everything=False)
        if self._bar is not None:
            self._bar.advance(len(values))

    def _write(self, everything: bool) -> None:
        """Whole files of what is held, and at the end a last one that may be shorter."""
        while self._held_rows >= self.shard_rows or (everything and self._held_rows):
            values, indices = (torch.cat(parts) for parts in zip(*self._held, strict=True))
            rows = min(self.shard_rows, self._held_rows)
            name = self.folder / _shard(len(self._shards))
            partial = name.with_suffix(".partial")
            tensors = {"values": values[:rows].contiguous(), "indices": indices[:rows].to(self._index_dtype)}
            self._library.save_file(tensors, partial)
            _onto_disk(partial)
            os.replace(partial, name)
            self._shards.append(rows)
            self._write_meta()
            self._held = [TopK(values[rows:], indices[rows:])]

    def _meta(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "k": self.k,
            "vocab_size": self.vocab_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }

    def _write_meta(self) -> None:
        partial = self.folder / (_META + ".partial")
        partial.write_text(json.dumps(self._meta() | {"shards": self._shards}, indent=1) + "\n")
        _onto_disk(partial)
        os.replace(partial, self.folder / _META)

    def _resume(self) -> list[int]:
        """Rows of the files that are there and complete; a file that the metadata do not know yet is written anew."""
        if not (self.folder / _META).exists():
            if any(self.folder.glob("shard-*.safetensors")):
                raise ValueError(
                    f"{self.folder} holds files of a cache without {_META}: remove them or use another folder"
                )
            self._shards = []
            self._write_meta()
            return []
        meta = _read_meta(self.folder)
        for name, value in self._meta().items():
            if meta[name] != value:
                raise ValueError(
                    f"{name} is {meta[name]!r} in the cache {self.folder}, but {value!r} was given"
                )
        return list(meta["shards"])


class TeacherCache:
    """Reads what ``TeacherCacheWriter`` wrote: a dataset of rows, of which only those asked for are read from disk.

    ``cache[i]``, ``cache[a:b]`` and ``cache[tensor or list of row numbers]`` give ``(values, indices)``, ``[k]`` or
    ``[n, k]``, ready for ``topk_kd_loss(..., teacher_form="log_probs")``. Files are memory-mapped when first used, in
    each worker process of a ``DataLoader`` anew.

    Args:
        folder: Of a cache.
        fingerprint: If given, that of the cache must be this.

    Raises:
        FileNotFoundError: There is no cache.
        ValueError: Another fingerprint or version, or files that do not fit their description.
        ImportError: safetensors is not installed (``pip install fasttransfer[cache]``).

    Example:
        >>> cache = TeacherCache("cache", fingerprint="teacher-7b/train-v1")
        >>> values, indices = cache[rows]  # rows: the batch's row numbers, int64
        >>> loss = topk_kd_loss(student(x), values, indices, teacher_form="log_probs", tail="bucket")
    """

    def __init__(self, folder: str | os.PathLike[str], *, fingerprint: str | None = None) -> None:
        self._library = _safetensors()
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        self.k: int = meta["k"]
        self.vocab_size: int = meta["vocab_size"]
        self.dtype = _DTYPES[check_choice("dtype", meta["dtype"], tuple(_DTYPES))]
        self.fingerprint: str = meta["fingerprint"]
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"fingerprint is {self.fingerprint!r} in the cache {folder}, but {fingerprint!r} was given"
            )
        self._rows: list[int] = meta["shards"]
        self._ends = torch.tensor(self._rows, dtype=torch.int64).cumsum(0).tolist()
        self._mapped: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """How many rows there are."""
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[TopK]:
        """Row by row."""
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files, which another process maps for itself."""
        return self.__dict__ | {"_mapped": {}, "_library": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process, or a copy."""
        self.__dict__.update(state)
        self._library = _safetensors()

    def __getitem__(self, rows: int | slice | Tensor | list[int]) -> TopK:
        """The values and indices of a row, of consecutive rows, or of these rows in this order."""
        if isinstance(rows, slice):
            numbers = range(*rows.indices(len(self)))
            if numbers.step == 1:
                return self._range(numbers.start, max(numbers.start, numbers.stop))
            return self._pick(torch.tensor(list(numbers), dtype=torch.int64))
        if isinstance(rows, (list, Tensor)):
            picked = torch.as_tensor(rows)
            if picked.dtype not in (torch.int64, torch.int32) and picked.numel():
                raise TypeError(f"rows must be integers, got {picked.dtype}")
            if picked.dim() != 1:
                raise TypeError(
                    f"rows must be a row number, a slice, or [n] row numbers, got {shape(picked)}"
                )
            return self._pick(picked.to("cpu", torch.int64))
        if isinstance(rows, bool) or not hasattr(rows, "__index__"):
            raise TypeError(
                f"rows must be a row number, a slice, or [n] row numbers, got {type(rows).__name__}"
            )
        values, indices = self._pick(torch.tensor([rows.__index__()]))
        return TopK(values[0], indices[0])

    def __getitems__(self, rows: list[int]) -> list[TopK]:
        """A batch at once, as a ``DataLoader`` asks for it."""
        values, indices = self._pick(torch.tensor(rows, dtype=torch.int64))
        return [TopK(v, i) for v, i in zip(values, indices, strict=True)]

    def _range(self, begin: int, end: int) -> TopK:
        parts = []
        shard = bisect_right(self._ends, begin)
        while begin < end:
            first = self._ends[shard] - self._rows[shard]
            stop = min(end, self._ends[shard])
            values, indices = self._map(shard)
            parts.append((values[begin - first : stop - first], indices[begin - first : stop - first]))
            begin, shard = stop, shard + 1
        if not parts:
            return self._new(0)
        # `cat` copies: nothing that is given away is mapped.
        values, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return TopK(values, _wide(indices))

    def _pick(self, rows: Tensor) -> TopK:
        rows = torch.where(rows < 0, rows + len(self), rows)
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise IndexError(f"row {int(wrong)} is not in a cache of {len(self)} rows")
        result = self._new(len(rows))
        shards = torch.bucketize(rows, torch.tensor(self._ends, dtype=torch.int64), right=True)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            values, indices = self._map(shard)
            local = rows[here] - (self._ends[shard] - self._rows[shard])
            result.values[here] = values[local]
            result.indices[here] = _wide(indices[local])
        return result

    def _new(self, rows: int) -> TopK:
        return TopK(torch.empty(rows, self.k, dtype=self.dtype), torch.empty(rows, self.k, dtype=torch.int64))

    def _map(self, shard: int) -> tuple[Tensor, Tensor]:
        if shard not in self._mapped:
            path = self.folder / _shard(shard)
            try:
                tensors = self._library.load_file(path)
            except Exception as error:  # SafetensorError is not a ValueError, a missing file neither
                raise ValueError(f"{path}, which {_META} names, cannot be read: {error}") from error
            expected = (self._rows[shard], self.k)
            for name, dtype in (("values", self.dtype), ("indices", _index_dtype(self.vocab_size))):
                found = tensors.get(name)
                if found is None or found.shape != expected or found.dtype != dtype:
                    raise ValueError(f"{path} does not hold {name} of shape {list(expected)} in {dtype}")
            indices = tensors["indices"]
            narrow = indices.dtype == torch.uint16
            self._mapped[shard] = tensors["values"], indices.view(torch.int16) if narrow else indices
        return self._mapped[shard]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / _META
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no teacher cache: there is no {_META}")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("version") != _VERSION:
        raise ValueError(
            f"{path} is of version {meta.get('version') if isinstance(meta, dict) else None!r}, this fasttransfer "
            f"reads version {_VERSION}"
        )
    missing = sorted(_FIELDS - meta.keys())
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return meta


def _onto_disk(path: Path) -> None:
    """Before it is renamed: else a crash of the machine may leave the new name with nothing in it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
