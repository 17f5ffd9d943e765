"""Argument checks shared by the public functions. Each names the argument, what was given and what is accepted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT_SET = frozenset(FLOATS)
_STRIDED = frozenset({torch.strided})
_FLOAT_NAMES = "float32, bfloat16, float16 or float64"

# Values (label range, positive temperature) are always checked on the CPU. On another device that would wait for
# it, so it is done on request only.
_CHECK_DEVICES = os.environ.get("FASTTRANSFER_CHECK", "0") == "1"


def check_tensor(
    name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS, accepted: str = _FLOAT_NAMES
) -> None:
    """Raise TypeError unless ``value`` is a strided tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_kind(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {accepted}, got {_dtype(value)}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {layout}")


def all_usable(tensors: Sequence[Tensor]) -> bool:
    """Whether check_tensor accepts them all: for lists of hundreds of tensors, without words."""
    return (
        {t.dtype for t in tensors} <= _FLOAT_SET
        and {t.layout for t in tensors} <= _STRIDED
        and not any(t.is_nested for t in tensors)
    )


def check_number(
    name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False
) -> float:
    """Return ``value`` as a float; raise unless it is a real number in [low, high] (or (low, high])."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):  # Real: NumPy's scalars
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    above = low < number if open_low else low <= number
    if not (above and number <= high and abs(number) != float("inf")):
        raise ValueError(f"{name} must be {_range(low, high, open_low)}, got {value}")
    return number


def check_count(name: str, value: Any, low: int = 1) -> int:
    """Return ``value``; raise TypeError unless it is an integer, ValueError unless it is at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def check_index(name: str, value: Any) -> int:
    """Return ``value``, which may be negative; raise unless it is an int64."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an int64, got {value}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value``; raise ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value``; raise TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_device(name: str, value: Any) -> torch.device | None:
    """Return ``value``, None or what names a device, as one; raise unless tensors can be kept there."""
    if value is None or isinstance(value, torch.device):
        device = value
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            device = torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"{name} must name a device, got {value!r}") from error
    else:
        raise TypeError(f"{name} must be a device, its name or None, got {_kind(value)}")
    if device is not None and device.type == "meta":
        raise ValueError(f"{name} must be a device that holds values, got {device}")
    return device


def check_group(group: Any, inplace: bool) -> None:
    """Of the option ``group``: a process group that this rank is in, or None."""
    if group is None:
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise ValueError("group was given, but this torch is built without torch.distributed")
    if not isinstance(group, dist.ProcessGroup):
        none = dist.GroupMember.NON_GROUP_MEMBER
        if group is none or (type(group) is int and group == none):
            raise ValueError(
                "group is one that this rank is not in: call the loss with group= on its members only"
            )
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {_kind(group)} (of a DeviceMesh: "
            "mesh.get_group())"
        )
    if not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialized (init_process_group)")
    if inplace:
        raise ValueError(
            "inplace=True cannot be used with group: the logits are read again after each exchange"
        )


def values_visible(t: Tensor) -> bool:
    """Whether the values of ``t`` may be looked at: not while tracing, and off the CPU only on request."""
    if torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter):
        return False
    return t.device.type == "cpu" or _CHECK_DEVICES


def checks_requested() -> bool:
    """Whether FASTTRANSFER_CHECK=1."""
    return _CHECK_DEVICES


def hides_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether a gradient is wanted that ``requires_grad`` does not show: a tangent, or a gradient outside of a vmap.

    A plain dispatcher call would drop it without a word; an autograd.Function says that it cannot.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    for t in tensors:
        while torch._C._functorch.is_functorch_wrapped_tensor(t):
            t = torch._C._functorch.get_unwrapped(t)
            if t.requires_grad:
                return True
    return False


def shape(t: Tensor) -> str:
    """The shape as people write it."""
    return str(list(t.shape))


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, str)) else type(value).__name__


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _range(low: float, high: float, open_low: bool) -> str:
    if low == float("-inf"):
        return "finite"
    if high == float("inf"):
        return ("greater than" if open_low else "at least") + f" {low:g} and finite"
    return f"between {low:g} and {high:g}"
