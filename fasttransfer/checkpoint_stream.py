"""Blending files piece by piece: a thread reads ahead, the kernel blends, a thread writes, a thread waits for the disk.

Elements are independent, so a piece need not be a whole tensor: memory is a few buffers, whatever the tensors' sizes.
A tensor that is mapped first is the exception: it is held whole.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fasttransfer.checkpoint_files import BLENDED, ITEM_SIZES, Entry
from fasttransfer.checkpoint_plan import Job, Operand, OutputFile
from fasttransfer.ops.blend import blend_inplace_op

# Small enough that all buffers stay in a cache of the processor, and enough of them that no thread waits for its turn
# on a busy machine. On two cores, beside 6 processes: 2.1 s for 2 GB; three of 1 MiB 2.6 s; three of 4 MiB 3.6 s.
PIECE_BYTES = 512 << 10  # of the widest operand of a piece
_DEPTH = 8  # pieces under way: half are read ahead, the others written
SYNC_BYTES = 64 << 20  # written between two waits for the disk: what an interrupted run may have to do again
_LEAST_PIECE = 64 << 10
_READ_AHEAD = 32  # pieces that the system is told of
_OPEN_FILES = 64


class Piece(NamedTuple):
    """Some elements of a tensor."""

    job: Job
    begin: int  # the first element
    numel: int

    @property
    def start(self) -> int:
        """Where it lies in the output."""
        return self.job.start + self.begin * ITEM_SIZES[self.job.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * ITEM_SIZES[self.job.dtype]

    @property
    def last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.begin + self.numel == self.job.numel


def piece_bytes(files: Sequence[OutputFile], sources: int) -> int:
    """Of each buffer: together they are at most as large as the largest tensor is in all checkpoints."""
    jobs = [job for file in files for job in file.jobs]
    largest = max((o.entry.nbytes for job in jobs for o in job.operands), default=0)
    share = largest * (sources + 1) // (_DEPTH * (sources + 2)) & -4096
    return max(_LEAST_PIECE, min(PIECE_BYTES, share))


def pieces(file: OutputFile, most: int) -> Iterator[Piece]:
    """The whole file, in order."""
    for job in file.jobs:
        widest = max(ITEM_SIZES[d] for d in (job.dtype, *(o.entry.dtype for o in job.operands)))
        step = most // widest
        for begin in range(0, job.numel, step):
            yield Piece(job, begin, min(step, job.numel - begin))


class Stream:
    """Buffers and threads for one blend."""

    def __init__(self, files: Sequence[OutputFile], sources: int) -> None:
        self._most = piece_bytes(files, sources)
        self._slots = [_Slot(sources + 1, self._most) for _ in range(_DEPTH)]
        self._inputs = _Inputs()
        self._mapped: dict[tuple[str, int], Tensor] = {}  # by tensor and operand
        # One thread of the kernel's keeps up with the one that reads. Several would spend their time waiting for each
        # other (1M elements take 100 us) and take the processors from reading and writing: 7 s where this takes 2.
        # Only the calling thread is limited; maps, on the reader, use as many as before.
        self._threads = torch.get_num_threads()
        self._reader = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(self._threads,))
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Stream:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        for pool in (self._reader, self._writer, self._syncer):
            pool.shutdown(cancel_futures=True)
        self._inputs.close()

    def write(
        self,
        file: OutputFile,
        path: Path,
        done: int,
        synced: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> None:
        """Write ``file`` to ``path``, of which the first ``done`` bytes are there; on disk when this returns.

        Args:
            file: What to write.
            path: Where.
            done: As ``synced`` was last told; 0: nothing.
            synced: Told how many bytes have reached the disk, now and then, on another thread.
            advance: Told how many bytes more are done.
        """
        todo = list(pieces(file, self._most))
        first = next((i for i, piece in enumerate(todo) if piece.start + piece.nbytes > done), len(todo))
        if done < len(file.header):
            first, start = 0, 0
        else:
            start = todo[first].start if first < len(todo) else file.nbytes
        with open(path, "r+b" if start else "wb", buffering=0) as out:
            out.truncate(start)
            out.seek(start)
            sink = _Sink(out, start, synced, self._syncer)
            advance(start)
            if not start:
                sink.write(memoryview(file.header))
                advance(len(file.header))
            self._run(todo[first:], sink, advance)
            sink.finish()

    def _run(self, todo: Sequence[Piece], sink: _Sink, advance: Callable[[int], None]) -> None:
        pending: deque[tuple[Piece, _Slot, Future[None]]] = deque()

        def blend_one() -> None:
            piece, slot, reading = pending.popleft()
            self._blend(piece, slot, reading, sink)
            advance(piece.nbytes)

        for i, piece in enumerate(todo):
            slot = self._slots[i % _DEPTH]
            slot.wait()
            following = todo[i + _READ_AHEAD] if i + _READ_AHEAD < len(todo) else None
            pending.append((piece, slot, self._reader.submit(self._read, piece, slot, following)))
            if len(pending) > _DEPTH // 2:
                blend_one()
        while pending:
            blend_one()
        for slot in self._slots:
            slot.wait()

    def _read(self, piece: Piece, slot: _Slot, following: Piece | None) -> None:
        if following is not None and not any(o.mapped for o in following.job.operands):
            for operand in following.job.operands:
                self._inputs.announce(*_place(operand, following))
        job = piece.job
        for i, operand in enumerate(job.operands):
            if not operand.mapped:
                offset, nbytes = _place(operand, piece)[1:]
                buffer = slot.output if job.copied else slot.inputs[i]
                self._inputs.read(operand.entry.file, offset, memoryview(buffer)[:nbytes])
            elif (job.name, i) not in self._mapped:
                self._mapped[job.name, i] = self._map(operand, job)

    def _map(self, operand: Operand, job: Job) -> Tensor:
        assert operand.rule is not None
        dtypes = [job.dtype, *(o.entry.dtype for o in job.operands)]
        wide = torch.float64 if "F64" in dtypes else torch.float32
        entry = operand.entry
        data = bytearray(entry.nbytes)
        self._inputs.read(entry.file, entry.start, memoryview(data))
        flat = torch.frombuffer(data, dtype=BLENDED[entry.dtype]) if data else torch.empty(0)
        return operand.rule.apply(flat.reshape(entry.shape), wide).reshape(-1)

    def _blend(self, piece: Piece, slot: _Slot, reading: Future[None], sink: _Sink) -> None:
        reading.result()
        job = piece.job
        if not job.copied:
            operands = [
                self._mapped[job.name, i][piece.begin : piece.begin + piece.numel]
                if operand.mapped
                else slot.tensor(i, operand.entry.dtype, piece.numel)
                for i, operand in enumerate(job.operands)
            ]
            # The op adds sources to a target of its output's dtype; with alpha 0 that target is not read.
            out = slot.tensor(-1, job.dtype, piece.numel)
            with torch.no_grad():
                blend_inplace_op([out], operands, [0.0], None, [], None, [o.coef for o in job.operands])
            if piece.last:
                for i in range(len(job.operands)):
                    self._mapped.pop((job.name, i), None)
        slot.written = self._writer.submit(sink.write, memoryview(slot.output)[: piece.nbytes])


class _Slot:
    """Buffers of one piece: its operands, and its result last."""

    def __init__(self, operands: int, nbytes: int) -> None:
        self.inputs = [bytearray(nbytes) for _ in range(operands)]
        self.output = bytearray(nbytes)
        self._tensors = [torch.frombuffer(b, dtype=torch.uint8) for b in (*self.inputs, self.output)]
        self.written: Future[None] | None = None

    def tensor(self, i: int, dtype: str, count: int) -> Tensor:
        return self._tensors[i][: count * ITEM_SIZES[dtype]].view(BLENDED[dtype])

    def wait(self) -> None:
        """Until what was in it is written."""
        if self.written is not None:
            self.written.result()
            self.written = None


class _Inputs:
    """The files that are read, by one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def _open(self, path: Path) -> Any:
        file: Any = self._files.get(path)
        if file is None:
            file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._files.move_to_end(path)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file

    def announce(self, path: Path, offset: int, nbytes: int) -> None:
        """Have the system start reading."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._open(path).fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, path: Path, offset: int, into: memoryview) -> None:
        file = self._open(path)
        file.seek(offset)
        while into:
            count = file.readinto(into)
            if not count:
                raise OSError(f"{path} has become shorter")
            into = into[count:]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Sink:
    """The file that is written, by one thread, while another has it brought to the disk."""

    def __init__(
        self, out: Any, position: int, synced: Callable[[int], None], syncer: ThreadPoolExecutor
    ) -> None:
        self._out, self._position, self._told, self._syncer = out, position, synced, syncer
        self._asked = position
        self._syncing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        while data:
            count = self._out.write(data)
            self._position += count
            data = data[count:]
        if self._position - self._asked >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._check()
            self._asked = self._position
            self._syncing = self._syncer.submit(self._sync, self._position)

    def finish(self) -> None:
        self._check()
        self._sync(self._position)

    def _check(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def _sync(self, position: int) -> None:
        getattr(os, "fdatasync", os.fsync)(self._out.fileno())
        self._told(position)


def _place(operand: Operand, piece: Piece) -> tuple[Path, int, int]:
    """File, offset and length of a piece of an operand."""
    entry: Entry = operand.entry
    size = ITEM_SIZES[entry.dtype]
    return entry.file, entry.start + piece.begin * size, piece.numel * size


def same_data(a: Entry, b: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.file, "rb") as file_a, open(b.file, "rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        left = a.nbytes
        while left:
            count = min(left, PIECE_BYTES)
            if file_a.read(count) != file_b.read(count):
                return False
            left -= count
    return True
