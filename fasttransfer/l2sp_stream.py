"""Constants that are kept elsewhere than the parameters, brought to them a block at a time, ahead of use.

Two buffers on the parameters' device are filled in turn: while one is read the other is filled, on CUDA by a stream of
its own from pinned memory. So the device holds two blocks of them, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasttransfer.ops.l2sp import _grad, l2sp_grad_op, l2sp_value_op
from fasttransfer.ops.library import accumulator
from fasttransfer.untraced import untraced

BLOCK_BYTES = 64 << 20  # of a block, unless one parameter's constants take more
_ALIGNMENT = 256

Column = Sequence[Tensor | None]  # one constant for each parameter; empty: none of this kind
Row = list[Tensor]
R = TypeVar("R")


def blocks(
    params: Sequence[Tensor], *columns: Column, limit: int | None = None
) -> Iterator[tuple[slice, list[list[Tensor | None]]]]:
    """The list in runs, each with its constants on the parameters' device: until the next run is asked for.

    Yields:
        Where in the list the run is, and its part of each column.
    """
    device = params[0].device
    rows: list[Row] = [
        [t for column in columns if column and (t := column[i]) is not None and is_away(t, device)]
        for i in range(len(params))
    ]
    sizes = [sum(_room(t) for t in row) for row in rows]
    runs = list(runs_within(sizes, BLOCK_BYTES if limit is None else limit))
    with closing(lane_to(device, max(sum(sizes[run]) for run in runs))) as lane:
        coming = lane.fill(0, [t for row in rows[runs[0]] for t in row])
        for k, run in enumerate(runs):
            arrived = iter(coming)
            if k + 1 < len(runs):
                coming = lane.fill((k + 1) % 2, [t for row in rows[runs[k + 1]] for t in row])
            lane.begin(k % 2)
            here: list[list[Tensor | None]] = [[] for _ in columns]
            for i in range(run.start, run.stop):
                for found, column in zip(here, columns, strict=True):
                    if column:
                        t = column[i]
                        found.append(next(arrived) if t is not None and is_away(t, device) else t)
            yield run, here
            lane.end(k % 2)


def runs_within(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive runs of as many as fit into ``limit``; what is larger is a run of its own."""
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            yield slice(first, i)
            first, total = i, 0
        total += size
    yield slice(first, len(sizes))


def is_away(t: Tensor, device: torch.device) -> bool:
    """Whether a constant has to be brought."""
    return t.device != device


def _room(t: Tensor) -> int:
    return -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT


def _laid_out(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room in a buffer of bytes for each of the tensors."""
    views, at = [], 0
    for t in tensors:
        views.append(buffer[at : at + t.nbytes].view(t.dtype).view(t.shape))
        at += _room(t)
    return views


def lane_to(device: torch.device, nbytes: int) -> Lane:
    """The way to a device, with buffers of so many bytes."""
    return CudaLane(device, nbytes) if device.type == "cuda" else Lane(device, nbytes)


class Lane:
    """Two buffers on a device. Here with the device's one stream: in order, nothing to wait for."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def fill(self, turn: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy into a buffer; returns where the tensors will be."""
        views = _laid_out(self.buffers[turn], tensors)
        for view, t in zip(views, tensors, strict=True):
            view.copy_(t, non_blocking=True)
        return views

    def begin(self, turn: int) -> None:
        """What the caller launches from now on reads the buffer."""

    def end(self, turn: int) -> None:
        """It has been launched: the buffer may be filled again after it."""

    def close(self) -> None:
        """No more."""


class CudaLane(Lane):
    """Copies on a stream of its own. Events order the two streams; the host waits for staging memory only."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        super().__init__(device, nbytes)
        self.main, self.side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event() for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in range(2)]
        for event in self.free:
            event.record(
                self.main
            )  # the buffers' memory may have been another's, still in use on this stream
        self.staging: list[Tensor | None] = [None, None]

    def fill(self, turn: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Pinned tensors are copied from where they are, others (mapped files) through pinned staging memory."""
        if not all(t.is_pinned() for t in tensors):
            tensors = self._staged(turn, tensors)
        self.side.wait_event(self.free[turn])
        with torch.cuda.stream(self.side):
            views = super().fill(turn, tensors)
            self.filled[turn].record(self.side)
        return views

    def _staged(self, turn: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.filled[
            turn
        ].synchronize()  # the copy out of this memory two blocks ago; at once where there was none
        staging = self.staging[turn]
        if staging is None:
            size = self.buffers[turn].numel()
            staging = self.staging[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        views = _laid_out(staging, tensors)
        for view, t in zip(views, tensors, strict=True):
            view.copy_(t)
        return views

    def begin(self, turn: int) -> None:
        """The caller's stream waits for the copy."""
        self.main.wait_event(self.filled[turn])

    def end(self, turn: int) -> None:
        """The next copy into this buffer waits for the caller's stream."""
        self.free[turn].record(self.main)

    def close(self) -> None:
        """The buffers are the caller's stream's memory again once the last copy is done, also after an error."""
        self.main.wait_stream(self.side)


@untraced
def outside_of_graphs(f: Callable[..., R], *args: Any) -> R:
    """``f(*args)``: the compiler cannot trace streams and buffers."""
    return f(*args)


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of blocks' values; of one block its own."""
    if len(values) == 1:
        return values[0]
    return torch.stack(list(values)).sum(dtype=accumulator(values[0])).to(values[0].dtype)


def streamed_value(
    params: Sequence[Tensor], start: Column, strength: Sequence[float], importance: Column
) -> Tensor:
    """The penalty, without a graph."""
    return total(
        [
            l2sp_value_op(params[run], points, strength[run], weights)
            for run, (points, weights) in blocks(params, start, importance)
        ]
    )


class StreamedL2SPFunction(torch.autograd.Function):
    """As ``L2SPFunction``; what backward needs of the constants is brought once more then, not kept on the device."""

    @staticmethod
    def forward(
        ctx: Any, start: Column, strength: Sequence[float], importance: Column, *params: Tensor
    ) -> Tensor:
        """The penalty, a scalar."""
        constants = [*start, *importance]
        ctx.strength, ctx.given = strength, [t is not None for t in constants]
        ctx.save_for_backward(*params, *(t for t in constants if t is not None))
        ctx.set_materialize_grads(False)
        return streamed_value(params, start, strength, importance)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        """``2 strength F (p - p0) upstream``."""
        count = len(ctx.strength)
        if upstream is None:
            return (None,) * (count + 3)
        params, rest = ctx.saved_tensors[:count], iter(ctx.saved_tensors[count:])
        constants = [next(rest) if given else None for given in ctx.given]
        start, importance = constants[:count], constants[count:]
        if torch.is_grad_enabled():  # create_graph keeps them: they cannot be in a buffer
            device = params[0].device
            start, importance = ([t if t is None else t.to(device) for t in c] for c in (start, importance))
            return None, None, None, *_grad(params, start, ctx.strength, importance, upstream)
        grads: list[Tensor] = []
        for run, (points, weights) in blocks(params, start, importance):
            grads += l2sp_grad_op(params[run], points, ctx.strength[run], weights, upstream)
        return None, None, None, *grads
