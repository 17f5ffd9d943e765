"""``EMACallback``: an exponential moving average of the weights in a Lightning Trainer."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fasttransfer.checks import check_choice
from fasttransfer.ema import EMA
from fasttransfer.integrations.lightning.base import (
    Callback,
    check_module_name,
    check_strategy,
    has_gradients,
    optimizers_of,
    part_of,
)
from fasttransfer.l2sp_module import skipped_by_scaler

_EVALUATED = ("average", "model")


class EMACallback(Callback):
    """Average the weights after every optimizer step, and evaluate with the average.

    One update per batch in which an optimizer stepped: none for batches that only accumulate gradients, none for a step
    that a GradScaler skips, and after what other callbacks do behind the step (``L2SPCallback``'s prox). The model
    trains on with its own weights; during validation, testing and prediction it has the average's, and its own again
    before the checkpoint callbacks save, or when evaluation ends by an exception.

    The average is part of the checkpoint (``checkpoint["callbacks"]["EMACallback"]["ema"]``, with the keys of
    ``AveragedModel``), beside the model's own weights: training resumes from both, and ``trainer.test(ckpt_path=...)``
    with this callback tests the average.

    Args:
        decay: As for ``fasttransfer.EMA``.
        module: The dotted name of the submodule that is averaged: the student beside a teacher, the generator beside a
            discriminator. None: all of the LightningModule.
        evaluate: What is evaluated: ``"average"``, or ``"model"``, which leaves the weights alone.
        warmup: As for ``EMA``.
        inv_gamma: As for ``EMA``.
        power: As for ``EMA``.
        min_decay: As for ``EMA``.
        update_after_step: As for ``EMA``.
        dtype: As for ``EMA``.
        device: As for ``EMA``.
        buffers: As for ``EMA``.

    The attribute ``ema`` is the ``EMA``, made when ``fit`` starts (None before). After ``fit`` the model has its own
    weights: ``callback.ema.copy_to(model)`` overwrites them with the average.

    Raises:
        TypeError, ValueError: Bad arguments; when ``fit`` starts: a module that is not there, none of its parameters in
            an optimizer, a strategy with flat shards (FSDP1, DeepSpeed).

    Example:
        >>> trainer = Trainer(callbacks=[EMACallback(0.999, warmup="ratio")])
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        module: str | None = None,
        evaluate: str = "average",
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
        buffers: str = "copy",
    ) -> None:
        self._module = check_module_name(module)
        self._evaluate = check_choice("evaluate", evaluate, _EVALUATED)
        self._options = {
            "decay": decay, "warmup": warmup, "inv_gamma": inv_gamma, "power": power, "min_decay": min_decay,
            "update_after_step": update_after_step, "dtype": dtype, "device": device, "buffers": buffers,
        }  # fmt: skip
        EMA(nn.Linear(1, 1), **self._options)  # its checks, now and not when training starts
        self.ema: EMA | None = None
        self._of: weakref.ref[nn.Module] | None = None  # the module that is averaged
        self._saved: dict[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        self._stepped = False
        self._swapped = ExitStack()

    # ------------------------------------------------------------------------------------------------ training
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the average; the model is on its device, with the weights that training starts from."""
        check_strategy(self, trainer)
        part = part_of(pl_module, self._module)
        optimizers = optimizers_of(trainer, part.parameters())
        if not optimizers:
            raise ValueError("none of the trainer's optimizers has one of the parameters that are averaged")
        self._stop()
        self._start(part)
        self._handles = [o.register_step_post_hook(self._after_step) for o in optimizers]

    def _start(self, part: nn.Module) -> None:
        with torch.inference_mode(False):  # Lightning evaluates in it
            self.ema, self._of = EMA(part, **self._options), weakref.ref(part)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the average of a checkpoint: some strategies read it after ``on_fit_start``."""
        self._take_saved()
        self._stepped = False

    def _take_saved(self) -> None:
        if self._saved is not None and self.ema is not None:
            self.ema.load_state_dict(self._saved)
        self._saved = None

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        self._stepped = self._stepped or (has_gradients(optimizer) and not skipped_by_scaler(optimizer))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, where an optimizer has stepped."""
        if self._stepped and self.ema is not None:
            self.ema.update(part_of(pl_module, self._module))
        self._stepped = False

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizers as they were."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave model and optimizers as they were."""
        self._stop()

    def _stop(self) -> None:
        self._swapped.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---------------------------------------------------------------------------------------------- evaluation
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in."""
        self._swap_in(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Swap the model's own weights in again."""
        self._swapped.close()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in."""
        self._swap_in(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Swap the model's own weights in again."""
        self._swapped.close()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in."""
        self._swap_in(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Swap the model's own weights in again."""
        self._swapped.close()

    def _swap_in(self, trainer: Any, pl_module: Any) -> None:
        part = part_of(pl_module, self._module)
        if self._saved is not None:  # evaluation of a checkpoint, in no fit
            self._start(part)
            self._take_saved()
        # Another model than the one that was averaged, evaluated by the same trainer, is evaluated as it is.
        averaged = self._of is not None and self._of() is part
        if self._evaluate == "average" and self.ema is not None and averaged:
            self._swapped.enter_context(self.ema.applied(part))

    # ---------------------------------------------------------------------------------------------- checkpoint
    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {} if self.ema is None else {"ema": self.ema.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The average that the next ``fit`` goes on with, or that the next evaluation is of."""
        self._saved = state_dict["ema"]
