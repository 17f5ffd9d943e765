"""What the trainer and the callbacks share: the library, and files in its checkpoints."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def _transformers() -> Any:
    for name in ("transformers", "accelerate"):  # TrainingArguments cannot be made without the second
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # it is there, and something that it needs is not
                raise
            raise ImportError(
                f"fasttransfer.integrations.transformers needs {name}: pip install fasttransfer[transformers]"
            ) from error
    return import_module("transformers")


_library = _transformers()
Trainer: Any = _library.Trainer
TrainerCallback: Any = _library.TrainerCallback
_losses = import_module("transformers.loss.loss_utils")
CAUSAL_LM_CLASSES = frozenset(
    import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
)


def shifting_loss(loss_type: str) -> bool:
    """Whether a model of this ``loss_type`` shifts labels."""
    return _losses.LOSS_MAPPING.get(loss_type) is _losses.ForCausalLMLoss


def check_path(name: str, path: Any) -> Path | None:
    """Return the path; raise TypeError unless it is one, or None."""
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path or None, got {path!r}")
    return None if path is None else Path(path)


def check_arguments(callback: Any, args: Any) -> None:
    """Raise ValueError where the model's parameters are split over processes."""
    for option in ("fsdp", "deepspeed"):
        if getattr(args, option, None):
            raise ValueError(
                f"{type(callback).__name__} needs whole parameters in every process, and TrainingArguments has "
                f"{option}={getattr(args, option)!r}"
            )


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's wrapper."""
    while (
        not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer"
    ):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(
                f"the Trainer's optimizer is no torch.optim.Optimizer, but {type(optimizer).__name__}"
            )
        optimizer = optimizer.optimizer
    return optimizer


def checkpoint_of(args: Any, state: Any) -> Path:
    """The folder of the checkpoint of this step: neither events nor arguments tell it."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def save_state(args: Any, state: Any, name: str, module: torch.nn.Module) -> None:
    """Into the checkpoint that was just written, by the process that writes it."""
    folder = checkpoint_of(args, state)
    if (
        args.should_save and folder.is_dir()
    ):  # hyperparameter searches have folders of their own, and resume nothing
        partial = folder / f"{name}.partial"
        torch.save(module.state_dict(), partial)
        os.replace(partial, folder / name)


def saved_state(callback: Any, args: Any, state: Any, name: str, resume_from: Path | None) -> dict[str, Any]:
    """What ``save_state`` wrote into the checkpoint from which training is resumed."""
    path = (resume_from or checkpoint_of(args, state)) / name
    if not path.is_file():
        raise ValueError(
            f"training is resumed at step {state.global_step}, but there is no {path}: give "
            f"{type(callback).__name__} the checkpoint's folder as resume_from"
        )
    return dict(torch.load(path, map_location="cpu", weights_only=True))
