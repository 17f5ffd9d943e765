"""What the callbacks share: Lightning under either of its names, and what they look at of a trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from fasttransfer.modules import find_module

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _lightning() -> Any:
    """The one of the two that the program has imported, as a Trainer takes single callbacks of its own class only."""
    loaded = [name for name in _NAMES if name in sys.modules]
    for name in loaded or _NAMES:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", name):  # it is there, and something that it needs is not
                raise
    raise ImportError(
        "fasttransfer.integrations.lightning needs Lightning: pip install fasttransfer[lightning]"
    )


_pl = _lightning()
Callback: Any = _pl.Callback


def check_module_name(module: Any) -> str | None:
    """Return ``module``; raise TypeError unless it is a string or None."""
    if module is not None and not isinstance(module, str):
        raise TypeError(
            f"module must be the dotted name of a module in the LightningModule or None, got {module!r}"
        )
    return module


def part_of(pl_module: nn.Module, module: str | None) -> nn.Module:
    """The module of this name, or all of the LightningModule.

    Raises:
        ValueError: A name that it does not have.
    """
    return pl_module if module is None else find_module("module", pl_module, module)


def is_strategy(trainer: Any, *names: str) -> bool:
    """Whether the trainer's strategy is of a class of these names, in whichever of Lightning's packages."""
    return any(kind.__name__ in names for kind in type(trainer.strategy).__mro__)


def check_strategy(callback: Any, trainer: Any) -> None:
    """Raise ValueError for strategies under which parameters are no longer found by name."""
    if is_strategy(trainer, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{type(callback).__name__} needs the model's parameters as they are, and "
            f"{type(trainer.strategy).__name__} keeps them in flat shards"
        )


def optimizers_of(trainer: Any, params: Iterable[Tensor]) -> list[Any]:
    """The trainer's optimizers that hold one of these parameters."""
    own = {id(p) for p in params}
    return [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    ]


def has_gradients(optimizer: Any) -> bool:
    """False where a ``training_step`` returned None: Lightning then calls a step that has nothing to do."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
