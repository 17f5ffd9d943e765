"""Functions that torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def untraced(f: Callable[P, R]) -> Callable[P, R]:
    """``f``, of which the compiler makes a graph break.

    As ``torch.compiler.disable``, which would import Dynamo with the package (a second, 66 MB): here it is imported by
    those who compile.
    """
    broken = _disable_dynamo(f)

    @wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (broken if torch.compiler.is_compiling() else f)(*args, **kwargs)

    return call
