"""``L2SPCallback``: the pull towards the starting point in ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttransfer.checks import check_choice, check_flag, check_number
from fasttransfer.integrations.transformers.base import (
    TrainerCallback,
    check_arguments,
    check_path,
    save_state,
    saved_state,
    torch_optimizer,
)
from fasttransfer.l2sp_module import L2SP

_FILE = "l2sp.pt"


class L2SPCallback(TrainerCallback):
    """Apply the penalty of ``fasttransfer.L2SP`` in every optimizer step, outside of autograd and of the loss.

    Once per optimizer step, whatever ``gradient_accumulation_steps`` is, and not in one that a GradScaler skips.
    Start points are taken when training starts, are saved with each checkpoint (``l2sp.pt``), and are those of the
    checkpoint when training is resumed.

    ``by="grad"``: the gradient is added right before the optimizer's step, to gradients that are reduced over
    processes, unscaled and, the Trainer having no event before that, **clipped**: ``max_grad_norm`` bounds the task's
    gradient alone. ``by="prox"``: the proximal step with the group's learning rate, right after the optimizer's step.
    ``"auto"``: the gradient for ``torch.optim.SGD``, prox for all others (as ``L2SP.attach``; the Trainer's default is
    AdamW).

    Logged, with ``log``, beside the loss and of the weights after the step: ``l2sp/penalty`` and ``l2sp/distance``, the
    norm of ``p - p0`` over all parameters that have a start point. Callbacks behind this one see them, and
    ``state.log_history``; those that ``report_to`` adds come before it: list such a callback yourself, behind it.

    Args:
        strength: The lambda, at least 0, or one per name pattern, as for ``L2SP``.
        start: As for ``L2SP``; None: the weights when training starts.
        importance: As for ``L2SP``.
        new: As for ``L2SP``.
        new_strength: As for ``L2SP``.
        include: As for ``L2SP``.
        exclude: As for ``L2SP``.
        dtype: As for ``L2SP``.
        device: As for ``L2SP``.
        by: ``"auto"``, ``"grad"`` or ``"prox"``.
        log: Whether to log.
        resume_from: The checkpoint's folder, where training is resumed from one outside of ``output_dir``.

    The attribute ``l2sp`` is the ``L2SP`` at work, None before training.

    Raises:
        TypeError, ValueError: Bad arguments; what needs the model to be seen (patterns, shapes), when training starts,
            as are: an optimizer with none of the penalised parameters, FSDP, DeepSpeed, a checkpoint without start
            points.

    Example:
        >>> Trainer(model, args, callbacks=[L2SPCallback(0.01, new="score.*")], train_dataset=data).train()
    """

    def __init__(
        self,
        strength: float | Mapping[str, float],
        *,
        start: Mapping[str, Tensor] | nn.Module | str | PathLike[str] | None = None,
        importance: Mapping[str, Tensor] | None = None,
        new: str | Iterable[str] | None = None,
        new_strength: float = 0.0,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        by: str = "auto",
        log: bool = True,
        resume_from: str | PathLike[str] | None = None,
    ) -> None:
        self._strength = (
            dict(strength) if isinstance(strength, Mapping) else check_number("strength", strength, 0)
        )
        self._options = {
            "start": start, "importance": importance, "new": new,
            "new_strength": check_number("new_strength", new_strength, 0), "include": include, "exclude": exclude,
            "dtype": dtype, "device": device,
        }  # fmt: skip
        self._by = check_choice("by", by, ("auto", "grad", "prox"))
        self._log = check_flag("log", log)
        self._resume_from = check_path("resume_from", resume_from)
        self.l2sp: L2SP | None = None
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Take the start points, or those of the checkpoint; the model has the weights that training starts from."""
        check_arguments(self, args)
        l2sp = L2SP(model, self._strength, **self._options)
        if state.global_step:
            l2sp.load_state_dict(saved_state(self, args, state, _FILE, self._resume_from))
        self._stop()
        self._handle = l2sp.attach(torch_optimizer(optimizer), by=self._by)
        self.l2sp = l2sp

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add to what is logged of a training step."""
        if not self._log or self.l2sp is None or logs is None or "loss" not in logs:
            return
        with torch.no_grad():
            # One more, 0: all of the parameters may be new ones.
            distances = [torch.zeros(()), *self.l2sp.distance().values()]
            distance = torch.stack([d.to(args.device, torch.float32) for d in distances]).norm()
            values = {"l2sp/penalty": self.l2sp().item(), "l2sp/distance": distance.item()}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start points and importances into the checkpoint."""
        if self.l2sp is not None and not args.save_only_model:
            save_state(args, state, _FILE, self.l2sp)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the optimizer as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
