"""The features that a model computes of a data set, at one of its layers."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from fasttransfer.checks import shape
from fasttransfer.modules import check_model, find_module
from fasttransfer.progress import progress_bar

_LABELS = ("labels", "label")


class Features(NamedTuple):
    """What ``extract_features`` returns, on the CPU."""

    features: Tensor  # [N, ...]
    labels: Tensor | None  # [N, ...]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    layer: str | None = None,
    *,
    transform: Callable[[Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Features:
    """The outputs of a layer for every batch of a loader, computed once: to train heads on, or to fit maps between.

    The model runs in eval mode and without a graph; afterwards each of its modules is in the mode that it was in.
    Nothing behind the layer is computed. Beside the result, one batch is held in memory.

    Args:
        model: Not modified, and not moved.
        loader: A ``DataLoader`` or any other iterable of batches: a tensor; a tuple or list ``(inputs, labels, ...)``,
            of which the rest is ignored; a mapping, given to the model by keyword but for ``"labels"`` or ``"label"``.
            The inputs of a tuple may themselves be a mapping. Labels are tensors with a row per row of the features.
        layer: The dotted name of a module (``"layer4.1"``); the first call of it in a forward pass counts. Default:
            the model's output.
        transform: Applied to the layer's output, on its device: to pool it, or to pick from a tuple. It gives a tensor
            whose first dimension is the batch, as the output itself must be without it.
        device: Where the inputs are moved. Default: where the model's first parameter (or buffer) is.
        path: A file for the features: their rows, one after the other, in C order and without a header (to read it
            again: ``torch.from_file(path, size=n * d, dtype=dtype).view(n, d)``; the labels are not in it). It grows
            batch by batch, and the result is mapped from it, so that features larger than memory are possible; writing
            to the result writes to the file. Until it is complete it is called ``path + ".partial"``, which is removed
            on failure; only then is an older file of that name replaced.
        progress: Whether to show a progress bar on stderr. Default: if rich is installed and stderr is a terminal.

    Returns:
        ``(features, labels)`` on the CPU, ``features`` ``[N, ...]`` in the dtype of the layer's output and ``labels``
        ``[N, ...]``, or None if the batches have none.

    Raises:
        TypeError: An argument, a batch, an output or labels of the wrong type.
        ValueError: An unknown layer, one that the model does not call, no batches, outputs without a row for each
            input, batches whose features or labels differ in shape or dtype.

    Example:
        >>> x, y = extract_features(model, loader, "avgpool", transform=lambda h: h.flatten(1))
    """
    check_model(model)
    if isinstance(loader, (Tensor, nn.Module, Mapping)) or not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {type(loader).__name__}")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of the layer's output, got {type(transform).__name__}")
    run = _Forward(model, layer)
    where = _device_of(model) if device is None else torch.device(device)
    expected = _expected_rows(loader)
    labels = _InMemory("labels", expected)
    with ExitStack() as stack:
        features = _InMemory("features", expected) if path is None else stack.enter_context(_to_file(path))
        stack.enter_context(_in_eval_mode(model))
        stack.enter_context(run.hooked())
        bar = stack.enter_context(progress_bar(_length(loader), "features", progress))
        n = 0
        for batch in loader:  # not of enumerate: it holds on to what it gave last
            args, kwargs, batch_labels = _parts(batch)
            output = run(*_moved(args, where), **_moved(kwargs, where))
            output = output if transform is None else transform(output)
            _check_output(output, args, batch_labels, transform is not None)
            if n and (batch_labels is None) != (labels.like is None):
                raise ValueError(
                    f"batch {n} has {'no ' * (batch_labels is None)}labels, unlike those before it"
                )
            features.add(n, output)
            if batch_labels is not None:
                labels.add(n, batch_labels)
            # Or this batch would be alive while the loader makes the next one.
            del batch, args, kwargs, batch_labels, output
            n += 1
            bar.advance()
        if not n:
            raise ValueError("loader gave no batches")
        return Features(features.result(), None if labels.like is None else labels.result())


# -------------------------------------------------------------------------------------------------- forward passes


class _Reached(BaseException):
    """Ends a forward pass at the layer. No Exception: a model may catch those."""


class _Forward:
    """The model up to its layer."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self.model, self.name = model, layer
        self.layer = None if layer is None else find_module("layer", model, layer)
        self.outputs: list[Any] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        if self.layer is None:
            yield
            return
        # A compiled model would keep the hook, and the exception, in the code that it compiles for eval mode. Nothing
        # has been compiled where dynamo has not been imported, which takes seconds.
        compiled = "torch._dynamo" in sys.modules
        handle = self.layer.register_forward_hook(self._stop)
        try:
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        finally:
            handle.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer is None:
            return self.model(*args, **kwargs)
        with suppress(_Reached):
            self.model(*args, **kwargs)
        if not self.outputs:
            raise ValueError(f"layer: the model's forward pass does not call {self.name!r}")
        output = self.outputs[0]
        self.outputs.clear()
        return output

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(output)
        raise _Reached


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode  # not train(): it would set the modes of the modules inside as well


def _device_of(model: nn.Module) -> torch.device | None:
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


# --------------------------------------------------------------------------------------------------------- batches


def _parts(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The arguments of the model and the labels in a batch."""
    labels = None
    if isinstance(batch, (tuple, list)) and batch:
        labels = batch[1] if len(batch) > 1 else None
        batch = batch[0]
    elif isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABELS if key in batch), None)
        batch = {key: value for key, value in batch.items() if key not in _LABELS}
    elif not isinstance(batch, Tensor):
        given = "an empty one" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"a batch must be a tensor, (inputs, labels, ...) or a mapping, got {given}")
    if not (labels is None or (isinstance(labels, Tensor) and labels.ndim)):
        given = "a scalar" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"the labels of a batch must be a tensor with a row for each input, got {given}")
    return ((), dict(batch), labels) if isinstance(batch, Mapping) else ((batch,), {}, labels)


def _moved(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Mapping):
        return {key: _moved(v, device) for key, v in value.items()}
    if hasattr(value, "to"):  # a tensor; a PackedSequence, which is a tuple too
        return value.to(device)
    if isinstance(value, (tuple, list)):
        moved = [_moved(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _check_output(output: Any, args: tuple[Any, ...], labels: Tensor | None, transformed: bool) -> None:
    what = "what transform gives" if transformed else "the layer's output"
    if not isinstance(output, Tensor):
        hint = "" if transformed else "; pick one with transform="
        raise TypeError(f"{what} must be a tensor, got {type(output).__name__}{hint}")
    if output.layout is not torch.strided or output.is_nested:
        layout = "a nested tensor" if output.is_nested else f"layout {output.layout}"
        raise TypeError(f"{what} must be a dense (strided) tensor, got {layout}")
    whose, like = ("labels", labels) if labels is not None else ("inputs", args[0] if args else None)
    if not output.ndim or (isinstance(like, Tensor) and like.ndim and len(output) != len(like)):
        rows = f", the {whose} shape {shape(like)}" if isinstance(like, Tensor) else ""
        raise ValueError(
            f"{what} must have the batch as its first dimension, got shape {shape(output)}{rows}; "
            "arrange it with transform="
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterator; a loader of an IterableDataset
        return None


def _expected_rows(loader: Any) -> int | None:
    """How many rows a DataLoader will most likely give: what is allocated for, and not relied upon."""
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    rows, batches = _length(loader.sampler), _length(loader)
    if rows is None or batches is None:
        return None
    return batches * loader.batch_sampler.batch_size if loader.batch_sampler.drop_last else rows


# ------------------------------------------------------------------------------------------------- where rows go to


class _Checked:
    """Rows that all look like the first ones."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.like: Tensor | None = None  # no rows, with the shape and dtype of all
        self.count = 0

    def check(self, batch: int, rows: Tensor) -> None:
        if self.like is None:
            self.like = torch.empty((0, *rows.shape[1:]), dtype=rows.dtype, device="cpu")
        if rows.shape[1:] != self.like.shape[1:] or rows.dtype != self.like.dtype:
            raise ValueError(
                f"the {self.what} of batch {batch} have shape {shape(rows)} and dtype {rows.dtype}, those of batch 0 "
                f"shape {['N', *self.like.shape[1:]]} and dtype {self.like.dtype}".replace("'N'", "N")
            )
        self.count += len(rows)


class _InMemory(_Checked):
    """Rows are copied into one tensor of the expected size; what exceeds it is kept in a list."""

    def __init__(self, what: str, expected: int | None) -> None:
        super().__init__(what)
        self.expected = expected
        self.whole: Tensor | None = None
        self.parts: list[Tensor] = []

    def add(self, batch: int, rows: Tensor) -> None:
        start = self.count
        self.check(batch, rows)
        if self.whole is None and self.expected is not None:
            # Memory is committed where it is written to: too much of it costs nothing yet.
            self.whole = torch.empty((self.expected, *rows.shape[1:]), dtype=rows.dtype, device="cpu")
        if self.whole is not None and self.count <= len(self.whole):
            self.whole[start : self.count] = rows
            return
        if self.whole is not None:
            self.parts, self.whole = [self.whole[:start]], None
            self.expected = None
        self.parts.append(_own(rows))

    def result(self) -> Tensor:
        if self.whole is None:
            return torch.cat(self.parts)
        # Fewer than expected: a slice would keep what was allocated for the rest, and torch.save would write it.
        return self.whole if self.count == len(self.whole) else self.whole[: self.count].clone()


class _InFile(_Checked):
    """Rows are appended to a file and mapped from there."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        super().__init__("features")
        self.file, self.path = file, path

    def add(self, batch: int, rows: Tensor) -> None:
        self.check(batch, rows)
        own = _own(rows)
        # The memory as bytes: Tensor.numpy() would need NumPy, and knows no bfloat16.
        self.file.write((ctypes.c_char * own.nbytes).from_address(own.data_ptr()))

    def result(self) -> Tensor:
        assert self.like is not None
        self.file.close()
        sizes = (self.count, *self.like.shape[1:])
        final = self.path.removesuffix(_PARTIAL)
        os.replace(self.path, final)  # an older file lives on for as long as somebody has it mapped
        # Shared: a private mapping that could be written to must fit into memory, says Linux.
        return torch.from_file(
            final, shared=True, size=torch.Size(sizes).numel(), dtype=self.like.dtype
        ).view(sizes)


_PARTIAL = ".partial"


@contextmanager
def _to_file(path: str | os.PathLike[str]) -> Iterator[_InFile]:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(name := os.fspath(path), str):
        raise TypeError(f"path must be a string or a path, got {path!r}")
    if not name:
        raise ValueError("path must be the name of a file, got an empty one")
    name = os.path.abspath(name)  # who computes the batches may change the directory
    if os.path.isdir(name):
        raise ValueError(f"path must be a file, got the directory {name!r}")
    partial = name + _PARTIAL
    try:
        with open(partial, "wb") as file:
            yield _InFile(file, partial)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def _own(rows: Tensor) -> Tensor:
    """A contiguous copy on the CPU: no view into something larger, nor of memory that somebody reuses."""
    return torch.empty(rows.shape, dtype=rows.dtype, device="cpu").copy_(rows)
