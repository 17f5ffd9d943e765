"""The library of the backend `simt` in this process: built and loaded when first asked for, swapped in and out."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.library import Library

from fasttransfer.ops import library as ops
from tests.simt import build

NAMESPACE = "fasttransfer_simt"
# What pure torch answers "not here" to, on a GPU as well: plain lists are a fast way of the CPU.
OF_THE_CPU = ("blend_plain_", "l2sp_add_grad_plain_")
# What is made of other operations and torch's products, on every device.
COMPOSED = ("linear_kd",)


class Launch(NamedTuple):
    """One launch of a kernel, and the bytes of global memory that it asked for."""

    blocks: int
    threads: int
    cluster: int
    shared_bytes: int
    loaded: int
    stored: int
    kernel: int  # its address

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored


@cache
def _load() -> tuple[ctypes.CDLL, Library]:
    """The C interface of tests/simt/settings.cpp, and the definitions of its ops, which live as long as this."""
    path = build.library()
    definitions = Library(NAMESPACE, "DEF")
    for name in ops._references:
        schema = str(getattr(getattr(torch.ops, ops.NAMESPACE), name).default._schema)
        definitions.define(schema.partition("::")[2])
    torch.ops.load_library(path)
    c = ctypes.CDLL(str(path))
    c.ft_simt_launches.restype = ctypes.c_int64
    c.ft_simt_launch.argtypes = (ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    return c, definitions


def has(name: str) -> bool:
    """Whether csrc/cuda has a kernel for this op."""
    _load()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def _kernel(name: str, missing: Callable[[str], Any]) -> Callable[..., Any]:
    if has(name):
        return getattr(getattr(torch.ops, NAMESPACE), name).default
    if name in (*OF_THE_CPU, *COMPOSED):
        return ops._references[name]
    return partial(_missing, name, missing)


def _missing(name: str, missing: Callable[[str], Any], *args: Any) -> Any:
    missing(f"csrc/cuda has no kernel for {name}")


@contextmanager
def swapped_in(missing: Callable[[str], Any]) -> Iterator[None]:
    """Within the context the CPU ops of fasttransfer are those of csrc/cuda; `missing(reason)` where there is none."""
    kernels = {name: _kernel(name, missing) for name in ops._references}
    override = Library(ops.NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a kernel is overridden, which is the point
            for name, kernel in kernels.items():
                override.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        override._destroy()


def _choose(setting: str, value: str) -> None:
    if not getattr(_load()[0], f"ft_simt_set_{setting}")(value.encode()):
        raise ValueError(f"the harness has no {setting} {value!r}")


@contextmanager
def machine(name: str = "sm_90", *, order: str = "forward", exp2: str = "rough") -> Iterator[None]:
    """Within the context kernels run on this machine: see README.md."""
    try:
        for setting, value in (("machine", name), ("order", order), ("exp2", exp2)):
            _choose(setting, value)
        yield
    finally:
        for setting, value in (("machine", "sm_90"), ("order", "forward"), ("exp2", "rough")):
            _choose(setting, value)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches within the context, filled in when it ends."""
    c = _load()[0]
    c.ft_simt_reset()
    seen: list[Launch] = []
    yield seen
    values = (ctypes.c_int64 * len(Launch._fields))()
    for i in range(c.ft_simt_launches()):
        c.ft_simt_launch(i, values)
        seen.append(Launch(*values))
    c.ft_simt_reset()
