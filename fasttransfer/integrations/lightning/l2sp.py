"""``L2SPCallback``: the pull towards the starting point in a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttransfer.checks import check_choice, check_flag, check_number
from fasttransfer.integrations.lightning.base import (
    Callback,
    check_module_name,
    check_strategy,
    has_gradients,
    optimizers_of,
    part_of,
)
from fasttransfer.l2sp_module import L2SP


class L2SPCallback(Callback):
    """Apply the penalty of ``fasttransfer.L2SP`` in every optimizer step, outside of autograd and of the loss.

    Once per optimizer step, also under ``accumulate_grad_batches`` and in manual optimization; a step that a GradScaler
    skips, or for which ``training_step`` returned None, applies nothing. Start points are taken when ``fit`` starts,
    are part of the checkpoint, and are those of the checkpoint when training is resumed.

    ``by="grad"``: the gradient is added after backward, all-reduce and unscaling and **before** Lightning clips
    (``on_before_optimizer_step``). ``by="prox"``: the proximal step with the group's learning rate, right after the
    optimizer's step. ``"auto"``: the gradient for ``torch.optim.SGD``, prox for all others, which would rescale the
    penalty (as ``L2SP.attach``, whose gradient hook is of no use here: Lightning runs backward inside of
    ``optimizer.step``). With manual optimization, what you clip yourself has not seen the penalty.

    Logged, with ``log``, whenever the logger's turn is (``Trainer(log_every_n_steps=...)``), of the weights after the
    step: ``l2sp/penalty`` and ``l2sp/distance``, the norm of ``p - p0`` over all parameters that have a start point.

    Args:
        strength: The lambda, at least 0, or one per name pattern, as for ``L2SP``.
        module: The dotted name of the submodule that is penalised (``"backbone"``); names in all other arguments are
            then those inside of it, as in the state dict it was loaded from. None: all of the LightningModule.
        start: As for ``L2SP``; None: the weights when ``fit`` starts.
        importance: As for ``L2SP``.
        new: As for ``L2SP``.
        new_strength: As for ``L2SP``.
        include: As for ``L2SP``.
        exclude: As for ``L2SP``.
        dtype: As for ``L2SP``.
        device: As for ``L2SP``.
        by: ``"auto"``, ``"grad"`` or ``"prox"``.
        log: Whether to log.

    The attribute ``l2sp`` is the ``L2SP`` at work, None before the first ``fit``.

    Raises:
        TypeError, ValueError: Bad arguments; what needs the model to be seen (patterns, shapes), when ``fit`` starts,
            as are: no optimizer with one of the penalised parameters, LBFGS, a strategy with flat shards (FSDP1,
            DeepSpeed).

    Example:
        >>> pull = L2SPCallback(0.01, module="backbone", start=pretrained.state_dict())
        >>> Trainer(callbacks=[pull], gradient_clip_val=1.0).fit(model, loader)
    """

    def __init__(
        self,
        strength: float | Mapping[str, float],
        *,
        module: str | None = None,
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
    ) -> None:
        self._strength = (
            dict(strength) if isinstance(strength, Mapping) else check_number("strength", strength, 0)
        )
        self._module = check_module_name(module)
        self._options = {
            "start": start, "importance": importance, "new": new,
            "new_strength": check_number("new_strength", new_strength, 0), "include": include, "exclude": exclude,
            "dtype": dtype, "device": device,
        }  # fmt: skip
        self._by = check_choice("by", by, ("auto", "grad", "prox"))
        self._log = check_flag("log", log)
        self.l2sp: L2SP | None = None
        self._saved: dict[str, Any] | None = None
        self._by_gradient: list[Any] = []
        self._handles: list[RemovableHandle] = []
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the start points; the model is on its device, with the weights that training starts from."""
        check_strategy(self, trainer)
        l2sp = L2SP(part_of(pl_module, self._module), self._strength, **self._options)
        optimizers = optimizers_of(trainer, l2sp.parameters_of_model())
        if not optimizers:
            raise ValueError("none of the trainer's optimizers has one of the parameters that are penalised")
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "LBFGS compares losses, which lack the penalty here: add fasttransfer.L2SP's value to the loss in "
                    "training_step instead"
                )
        self._stop()
        self.l2sp = l2sp
        ways = [l2sp.way(optimizer, self._by) for optimizer in optimizers]
        self._by_gradient = [o for o, way in zip(optimizers, ways, strict=True) if way == "grad"]
        self._handles = [
            o.register_step_post_hook(self._after_step)
            for o, way in zip(optimizers, ways, strict=True)
            if way == "prox"
        ]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the start points of a checkpoint: some strategies read it after ``on_fit_start``."""
        if self._saved is not None and self.l2sp is not None:
            self.l2sp.load_state_dict(self._saved)
        self._saved = None
        self._logged_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient; gradients are unscaled, except those of a fused optimizer, which does it itself."""
        if not any(optimizer is o for o in self._by_gradient) or not has_gradients(optimizer):
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = None
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = scaler._get_scale_async()  # on the device: no wait
        if self.l2sp is not None:
            self.l2sp.add_grad_for_(optimizer, grad_scale=scale, over_ranks=False)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self.l2sp is not None and has_gradients(optimizer):
            self.l2sp.prox_for_(optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, where a step was taken and the logger's turn is."""
        if not self._log or self.l2sp is None or trainer.global_step == self._logged_step:
            return
        self._logged_step = trainer.global_step
        if trainer._logger_connector.should_update_logs:
            with torch.no_grad():
                # One more, 0: all of the parameters may be new ones.
                distances = [torch.zeros(()), *self.l2sp.distance().values()]
                distance = torch.stack([d.to(pl_module.device, torch.float32) for d in distances]).norm()
                values = {"l2sp/penalty": self.l2sp(), "l2sp/distance": distance}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizers as they were."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._by_gradient = [], []

    def state_dict(self) -> dict[str, Any]:
        """The start points and importances."""
        return {} if self.l2sp is None else {"l2sp": self.l2sp.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those that the next ``fit`` goes on with."""
        self._saved = state_dict["l2sp"]
