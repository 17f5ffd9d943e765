"""``StagedUnfreezing``: the head first, then group after group of layers, in a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fasttransfer.checks import check_choice, check_count, check_number
from fasttransfer.integrations.lightning.base import (
    Callback,
    check_module_name,
    check_strategy,
    is_strategy,
    part_of,
)
from fasttransfer.modules import freeze, select, thaw


class StagedUnfreezing(Callback):
    """Freeze a model when ``fit`` starts and thaw it stage by stage.

    Uses ``fasttransfer.freeze`` and ``thaw``: a BatchNorm whose parameters are frozen keeps its statistics, whatever
    ``model.train()`` says. What no stage names is frozen for good (a teacher, say).

    The optimizer has all stages' parameters **from the start**; the callback checks it. A frozen parameter has no
    gradient, so every optimizer of torch passes it over: no decay, no momentum, and its state begins with its first
    gradient. Parameter groups added when a stage begins would be unknown to a learning-rate scheduler, which has one
    base rate per group that it was made with, and a checkpoint's optimizer would not fit the new one when training is
    resumed. A scheduler therefore moves the rates of frozen stages too: a stage joins at its present rate.

    Nothing is kept in the checkpoint: which stages are thawed follows from the epoch or step that is resumed.

    Args:
        stages: ``{pattern: begin}``: names or glob patterns of parameters or modules as for ``freeze`` (``"head"``,
            ``"layer4.*"``), and the epoch or optimizer step, counted from 0, that the stage begins with. Of two
            patterns that match a parameter, the first one counts. At least one stage must begin at 0.
        unit: ``"epoch"`` (``trainer.current_epoch``) or ``"step"`` (``trainer.global_step``; a stage begins with the
            first batch of the accumulation behind the step).
        module: The dotted name of the submodule that is frozen and thawed; patterns are names inside of it, and what is
            outside is left as it is. None: all of the LightningModule.

    Raises:
        TypeError, ValueError: Bad arguments; when ``fit`` starts: a pattern that matches nothing or nothing that an
            earlier one does not, a parameter that is in no optimizer, a DDP strategy that does not look for unused
            parameters, one with flat shards (FSDP1, DeepSpeed).

    Example:
        >>> unfreezing = StagedUnfreezing({"head": 0, "body.layer4": 2, "body": 5})
        >>> class Model(LightningModule):
        ...     def configure_optimizers(self):
        ...         return AdamW(unfreezing.param_groups(self, {"head": 1e-2, "body.layer4": 1e-3, "body": 1e-4}))
        >>> Trainer(callbacks=[unfreezing], max_epochs=10).fit(Model(), loader)
    """

    def __init__(self, stages: Mapping[str, int], *, unit: str = "epoch", module: str | None = None) -> None:
        if not isinstance(stages, Mapping):
            raise TypeError(
                f"stages must be a dict of an epoch or step per pattern, got {type(stages).__name__}"
            )
        for pattern, begin in stages.items():
            if not isinstance(pattern, str):
                raise TypeError(f"the patterns of stages must be strings, got {pattern!r}")
            check_count(f"stages[{pattern!r}]", begin, 0)
        if 0 not in stages.values():
            raise ValueError(f"one of the stages must begin at 0, or nothing is trained; got {dict(stages)}")
        self._stages = dict(stages)
        self._unit = check_choice("unit", unit, ("epoch", "step"))
        self._module = check_module_name(module)
        self._waiting: list[str] = []

    def param_groups(self, pl_module: nn.Module, lr: float | Mapping[str, float]) -> list[dict[str, Any]]:
        """One parameter group per stage, for the optimizer of ``configure_optimizers``.

        Args:
            pl_module: The LightningModule.
            lr: The learning rate of all stages, or of each, by the patterns of ``stages``.

        Returns:
            Groups with ``params``, ``lr`` and ``name`` (the pattern), in the order of the stages.

        Raises:
            TypeError, ValueError: A rate that is missing, unknown or negative; patterns as when ``fit`` starts.
        """
        by_stage = lr if isinstance(lr, Mapping) else dict.fromkeys(self._stages, lr)
        if by_stage.keys() != self._stages.keys():
            raise ValueError(
                f"lr must have the patterns of stages, which are {list(self._stages)}, got {list(by_stage)}"
            )
        rates = {pattern: check_number(f"lr[{pattern!r}]", rate, 0) for pattern, rate in by_stage.items()}
        return [
            {"params": list(params.values()), "lr": rates[pattern], "name": pattern}
            for pattern, params in self._parameters(part_of(pl_module, self._module)).items()
        ]

    def _parameters(self, part: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The parameters of each stage, by name."""
        found = {}
        for pattern in self._stages:
            params, norms = select(part, pattern, self._before(pattern), "stages")
            if not params and not norms:
                raise ValueError(
                    f"stages: all that {pattern!r} matches belongs to the patterns before it: put it first"
                )
            found[pattern] = {
                name: p for name, p in params.items() if p.is_floating_point() or p.is_complex()
            }
        return found

    def _before(self, pattern: str) -> list[str]:
        patterns = list(self._stages)
        return patterns[: patterns.index(pattern)]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze all: behind ``configure_optimizers``, which may look at ``requires_grad``, and behind DDP's setup.

        DDP reduces the gradients of what was trainable when it was set up: frozen before, a stage that is thawed later
        would drift apart on the ranks.
        """
        check_strategy(self, trainer)
        _check_ddp(trainer)
        part = part_of(pl_module, self._module)
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        for pattern, params in self._parameters(part).items():
            lacking = [name for name, p in params.items() if id(p) not in optimized]
            if lacking:
                raise ValueError(
                    f"{lacking[0]!r} of the stage {pattern!r} is in none of the optimizers: give them the parameters "
                    "of all stages from the start, as param_groups does (frozen ones are passed over)"
                )
        freeze(part)
        self._waiting = list(self._stages)
        self._thaw(trainer, pl_module)  # the summary of the model is printed now

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Thaw what is due: here, as a resumed run may begin inside of an epoch."""
        self._thaw(trainer, pl_module)

    def _thaw(self, trainer: Any, pl_module: Any) -> None:
        now = trainer.current_epoch if self._unit == "epoch" else trainer.global_step
        for pattern in [waiting for waiting in self._waiting if self._stages[waiting] <= now]:
            thaw(part_of(pl_module, self._module), pattern, self._before(pattern))
            self._waiting.remove(pattern)


def _check_ddp(trainer: Any) -> None:
    ddp = is_strategy(trainer, "DDPStrategy")
    if ddp and not trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ValueError(
            "StagedUnfreezing under DDP needs strategy='ddp_find_unused_parameters_true': DDP waits for the gradients "
            "of frozen parameters otherwise"
        )
