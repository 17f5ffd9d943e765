"""``EMACallback``: an exponential moving average of the weights in ``transformers.Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fasttransfer.checks import check_choice
from fasttransfer.ema import EMA
from fasttransfer.integrations.transformers.base import (
    TrainerCallback,
    check_arguments,
    check_path,
    save_state,
    saved_state,
)

_FILE = "ema.pt"
_EVALUATED = ("average", "model")


class EMACallback(TrainerCallback):
    """Average the weights after every optimizer step, and evaluate with the average while training.

    One update per optimizer step, whatever ``gradient_accumulation_steps`` is, behind ``L2SPCallback``'s prox, and none
    for a step that a GradScaler skips. The Trainer has no event before an evaluation: the average is swapped in by a
    forward of the model in eval mode, and the model's own weights are swapped in again when the evaluation ends, before
    a forward in training mode, and before anything reads or loads a ``state_dict`` (so that checkpoints have the
    model's own). Where an evaluation ends by an exception there is no event either: ``model.state_dict()`` swaps.

    The average is saved with each checkpoint (``ema.pt``, with the keys of ``AveragedModel``), and training is resumed
    from both. ``load_best_model_at_end`` loads the model's own weights of the step whose average was best.

    Args:
        decay: As for ``fasttransfer.EMA``.
        evaluate: What is evaluated: ``"average"``, or ``"model"``, which leaves the weights alone.
        warmup: As for ``EMA``.
        inv_gamma: As for ``EMA``.
        power: As for ``EMA``.
        min_decay: As for ``EMA``.
        update_after_step: As for ``EMA``.
        dtype: As for ``EMA``.
        device: As for ``EMA``.
        buffers: As for ``EMA``.
        resume_from: The checkpoint's folder, where training is resumed from one outside of ``output_dir``.

    The attribute ``ema`` is the ``EMA``, made when training starts (None before). After training the model has its own
    weights, and is evaluated with them: ``callback.ema.copy_to(model)`` overwrites them with the average,
    ``with callback.ema.applied(model): trainer.evaluate()`` does not.

    Raises:
        TypeError, ValueError: Bad arguments; when training starts: FSDP, DeepSpeed, a checkpoint without an average.

    Example:
        >>> average = EMACallback(0.999, warmup="ratio")
        >>> Trainer(model, args, callbacks=[average], train_dataset=data).train()
        >>> average.ema.copy_to(model)
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        evaluate: str = "average",
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
        buffers: str = "copy",
        resume_from: str | PathLike[str] | None = None,
    ) -> None:
        self._evaluate = check_choice("evaluate", evaluate, _EVALUATED)
        self._resume_from = check_path("resume_from", resume_from)
        self._options = {
            "decay": decay, "warmup": warmup, "inv_gamma": inv_gamma, "power": power, "min_decay": min_decay,
            "update_after_step": update_after_step, "dtype": dtype, "device": device, "buffers": buffers,
        }  # fmt: skip
        EMA(nn.Linear(1, 1), **self._options)  # its checks, now and not when training starts
        self.ema: EMA | None = None
        self._handles: list[RemovableHandle] = []
        self._swapped = ExitStack()
        self._is_swapped = False

    # ------------------------------------------------------------------------------------------------ training
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Start the average, or go on with that of the checkpoint."""
        check_arguments(self, args)
        self._stop()
        ema = EMA(model, **self._options)
        if state.global_step:
            ema.load_state_dict(saved_state(self, args, state, _FILE, self._resume_from))
        self.ema = ema
        if self._evaluate == "average":
            self._handles = [
                model.register_forward_pre_hook(self._before_forward),
                model.register_state_dict_pre_hook(self._before_access),
                model.register_load_state_dict_pre_hook(self._before_access),
            ]

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Update."""
        if self.ema is not None and not getattr(optimizer, "step_was_skipped", False):
            self.ema.update(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The average into the checkpoint."""
        if self.ema is not None:
            save_state(args, state, _FILE, self.ema)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as it was."""
        self._stop()

    def _stop(self) -> None:
        self._swap_out()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---------------------------------------------------------------------------------------------- evaluation
    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training:
            self._swap_out()
        elif not self._is_swapped and self.ema is not None:
            self._swapped.enter_context(self.ema.applied(model))
            self._is_swapped = True

    def _before_access(self, *_: Any) -> None:
        # EMA itself looks tensors up in modules: it reads no state_dict.
        self._swap_out()

    def _swap_out(self) -> None:
        self._is_swapped = False
        self._swapped.close()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Swap the model's own weights in again."""
        self._swap_out()

    def on_predict(self, args: Any, state: Any, control: Any, *_: Any, **__: Any) -> None:
        """Swap the model's own weights in again."""
        self._swap_out()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Swap the model's own weights in again, whatever another callback has evaluated."""
        self._swap_out()
