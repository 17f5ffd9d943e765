"""``EMA``: an exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer import fast_lists
from fasttransfer.checks import (
    FLOATS,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_number,
    shape,
)
from fasttransfer.names import Collection, collect
from fasttransfer.ops.blend import blend_inplace_op
from fasttransfer.sharded_params import any_dtensor, count_writes, is_dtensor, parts, reshard
from fasttransfer.tensor_tree import TensorTree, split_name

_WARMUPS = ("none", "ratio", "power")
_BUFFERS = ("copy", "blend")


class EMA(nn.Module):
    r"""An exponential moving average of a model: ``average = d * average + (1 - d) * parameter`` per ``update``.

    The average is kept in float32 (float64 for float64 parameters) whatever the model's dtype: in bfloat16 it would
    stand still as soon as ``(1 - d) * (parameter - average)`` is less than half a unit in its last place. All
    tensors are averaged in one pass. Tied parameters count once. Integer buffers are copied, never averaged. Of
    parameters that are DTensors (FSDP2: make it after ``fully_shard``; docs/parallel.md) each rank averages its part.

    The decay of update n (n = 1, 2, ...), with ``s = n - update_after_step - 1``::

        s <= 0:             0, the average is a copy      (with warmup "none": only the first update, as AveragedModel)
        warmup "none"       decay
        warmup "ratio"      min(decay, (1 + s) / (10 + s))                     TensorFlow, diffusers' default
        warmup "power"      min(decay, 1 - (1 + s / inv_gamma) ** -power)      timm, diffusers' use_ema_warmup
        and never below min_decay

    Args:
        model: The model to follow. Its values now are the first average.
        decay: d, in [0, 1].
        warmup: ``"none"``, ``"ratio"`` or ``"power"``.
        inv_gamma: Of ``"power"``, greater than 0.
        power: Of ``"power"``, greater than 0; 2/3 for a million steps and more, 3/4 for fewer.
        min_decay: In [0, 1].
        update_after_step: Updates that only copy.
        dtype: Of the average's floating tensors, or None for the rule above.
        device: Where the average is kept; None: beside each parameter. On another device every update copies first.
        buffers: Floating buffers are ``"copy"``: copied (batch norm statistics are averages already), or
            ``"blend"``: averaged too.
        capturable: Keep the number of updates on the device and compute the decay there, so that ``update`` can be
            captured in a CUDA graph, and compiled without a recompilation per step.

    The ``state_dict`` has the keys of ``torch.optim.swa_utils.AveragedModel`` (``n_averaged``, ``module.<name>``).
    ``load_state_dict`` takes that, and that of ``diffusers.training_utils.EMAModel`` (``shadow_params``).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A number out of its range, a model without floating tensors.

    Example:
        >>> ema = EMA(model, 0.999)
        >>> optimizer.step(); ema.update(model)
        >>> with ema.applied(model):
        ...     validate(model)
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        dtype: torch.dtype | None = None,
        device: Any = None,
        buffers: str = "copy",
        capturable: bool = False,
    ) -> None:
        super().__init__()
        self.decay = check_number("decay", decay, 0, 1)
        self.warmup = check_choice("warmup", warmup, _WARMUPS)
        self.inv_gamma = check_number("inv_gamma", inv_gamma, 0, open_low=True)
        self.power = check_number("power", power, 0, open_low=True)
        self.min_decay = check_number("min_decay", min_decay, 0, 1)
        self.update_after_step = check_count("update_after_step", update_after_step, 0)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.buffer_mode = check_choice("buffers", buffers, _BUFFERS)
        self.capturable = check_flag("capturable", capturable)
        collected = _collect(model)
        found = collected.tensors
        device = check_device("device", device)
        _check_home(found, device)
        averaged = {name: t for name, t in found.items() if t.dtype in FLOATS}
        if not averaged:
            raise ValueError("model has no floating tensors to average")
        with torch.no_grad():
            values = {
                name: t.detach().to(
                    t.device if device is None else device,
                    (dtype or _average_dtype(t)) if name in averaged else t.dtype,
                    copy=True,
                    memory_format=torch.preserve_format,
                )
                for name, t in found.items()
            }
        self.module = TensorTree(values, "averaged tensors")
        first = next(iter(values.values()))
        self.register_buffer(
            "n_averaged", torch.zeros((), dtype=torch.int64, device=first.device if capturable else "cpu")
        )
        self._parameters_of_model = frozenset(collect("model", model).tensors)
        # The other names of tied tensors, under which AveragedModel saves them a second time.
        self._other_names = frozenset(collected.aliases) - found.keys()
        self._known: _Places | None = None

    # --------------------------------------------------------------------------------------------- updating
    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present values: call it after ``optimizer.step()``.

        Args:
            model: The model, or another with the same names and shapes.

        Raises:
            TypeError: Not a module, or a tensor that has become one of integers.
            ValueError: A name that one side lacks, another shape (the error names it). Nothing has changed then.
        """
        values, averages = self._values(model), self.module.tensors()
        _check_same(values, averages)
        wholes = averages.values()
        averages, values = _parts(averages, values, "the average of {!r}", "model's {!r}")
        blended: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for name, average in averages.items():
            value = values[name].detach()
            if value.device != average.device:
                value = value.to(average.device, non_blocking=True)
            is_buffer = name not in self._parameters_of_model
            plain = average.dtype in FLOATS and not (is_buffer and self.buffer_mode == "copy")
            (blended if plain else copied).append((average, value))
        decay = self._next_decay()
        for average, value in copied:
            average.copy_(value)
        if isinstance(decay, float) and decay == 0:
            for average, value in blended:
                average.copy_(value)
        elif blended:
            _blend_([average for average, _ in blended], [value for _, value in blended], decay)
        count_writes(wholes)

    def _next_decay(self) -> float | Tensor:
        """Counts the update, and says how much of the average stays."""
        if self.capturable:
            self.n_averaged += 1
            n: Any = (
                self.n_averaged.double() if self.n_averaged.device.type != "mps" else self.n_averaged.float()
            )
            s = n - (self.update_after_step + 1)
            decay = torch.clamp(self._warmed(s.clamp_min(0)), self.min_decay, max(self.decay, self.min_decay))
            # As wide as it is: 0.999 in float32 makes 1 - d wrong by 1e-5 of itself, in an average of float64 too.
            return torch.where(s <= 0, 0.0, decay)
        self.n_averaged += 1
        s = int(self.n_averaged) - self.update_after_step - 1
        if s <= 0:
            return 0.0
        return float(max(min(self._warmed(s), self.decay), self.min_decay))

    def _warmed(self, s: Any) -> Any:
        if self.warmup == "ratio":
            return (1 + s) / (10 + s)
        if self.warmup == "power":
            return 1 - (1 + s / self.inv_gamma) ** -self.power
        return self.decay + 0 * s

    @property
    def current_decay(self) -> float:
        """The decay of the last update (0 before the first); reads the count, which waits for the device if there."""
        s = int(self.n_averaged) - self.update_after_step - 1
        return 0.0 if s <= 0 else float(max(min(self._warmed(s), self.decay), self.min_decay))

    # ---------------------------------------------------------------------------------------------- using it
    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters and buffers with the average, rounded to the model's dtypes.

        Raises:
            TypeError, ValueError: As ``update``. Nothing has changed then.
        """
        values, averages = self._values(model), self.module.tensors()
        _check_same(values, averages)
        _copy_(values, averages, "model's {!r}", "the average of {!r}")

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context the model has the average's values; afterwards its own again, whatever happened inside.

        Parameters stay the same tensors, so optimizers, compiled code and CUDA graphs keep working.

        Raises:
            TypeError, ValueError: As ``update``. Nothing has changed then.
        """
        values = self._values(model)
        _check_same(values, self.module.tensors())
        _parts(values, self.module.tensors(), "model's {!r}", "the average of {!r}")
        kept = {name: t.detach().clone() for name, t in values.items()}
        try:
            self.copy_to(model)
            yield model
        finally:
            with torch.no_grad():
                reshard(model)
                _copy_(values, kept, "model's {!r}", "the kept {!r}")

    def average(self) -> dict[str, Tensor]:
        """The averaged tensors by the model's names: for ``torch.func.functional_call`` or ``load_state_dict``."""
        return self.module.tensors()

    # -------------------------------------------------------------------------------------------- checkpoints
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state of this class, of ``AveragedModel``, or of diffusers' ``EMAModel``.

        Tied tensors that a state holds under each of their names are taken from the first. A state of diffusers holds
        its parameters as a list in the order of ``model.parameters()``, and its own schedule, which is taken over; it
        knows no buffers, which stay as they are. What it does not say (of the schedule) stays too.

        Raises:
            TypeError, ValueError: A state of diffusers without ``optimization_step``, with a list of another length or
                with other shapes, or with a schedule out of range. Nothing has changed then.
            RuntimeError: As ``nn.Module.load_state_dict``.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a state dict, got {type(state_dict).__name__}")
        if "shadow_params" not in state_dict:
            others = {f"module.{name}" for name in self._other_names}
            state_dict = {key: t for key, t in state_dict.items() if key not in others}
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        averages = self.module.tensors()
        names = [name for name in averages if name in self._parameters_of_model]
        shown = _shadows(state_dict["shadow_params"], {name: averages[name] for name in names})
        schedule = self._schedule_of(state_dict)
        if "optimization_step" not in state_dict:
            raise ValueError(
                "the state has shadow_params, but no optimization_step: how many updates there were"
            )
        count = check_count("optimization_step", state_dict["optimization_step"], 0)
        with torch.no_grad():
            _copy_(
                {name: averages[name] for name in names},
                shown,
                "the average of {!r}",
                "shadow_params of {!r}",
            )
            self.n_averaged.fill_(count)
        for name, value in schedule.items():
            setattr(self, name, value)
        return nn.modules.module._IncompatibleKeys([], [])

    def _schedule_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that a state of diffusers sets."""
        return {
            "decay": check_number("decay", state.get("decay", self.decay), 0, 1),
            "min_decay": check_number("min_decay", state.get("min_decay", self.min_decay), 0, 1),
            "update_after_step": check_count(
                "update_after_step", state.get("update_after_step", self.update_after_step), 0
            ),
            "warmup": "power"
            if check_flag("use_ema_warmup", state.get("use_ema_warmup", False))
            else "ratio",
            "inv_gamma": check_number("inv_gamma", state.get("inv_gamma", self.inv_gamma), 0, open_low=True),
            "power": check_number("power", state.get("power", self.power), 0, open_low=True),
        }

    def diffusers_state_dict(self) -> dict[str, Any]:
        """What ``diffusers.training_utils.EMAModel.load_state_dict`` takes.

        Raises:
            ValueError: ``warmup="none"``, which diffusers does not have.
        """
        if self.warmup == "none":
            raise ValueError("warmup='none' cannot be told to diffusers, which warms up always")
        averages = self.module.tensors()
        return {
            "decay": self.decay,
            "min_decay": self.min_decay,
            "optimization_step": int(self.n_averaged),
            "update_after_step": self.update_after_step,
            "use_ema_warmup": self.warmup == "power",
            "inv_gamma": self.inv_gamma,
            "power": self.power,
            "shadow_params": [t for name, t in averages.items() if name in self._parameters_of_model],
        }

    def extra_repr(self) -> str:
        """Decay, schedule and how many tensors are averaged."""
        schedule = "" if self.warmup == "none" else f", warmup={self.warmup!r}"
        return f"decay={self.decay}{schedule}, tensors={len(self.module.tensors())}"

    def _values(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors by name, looked up in the modules that hold them: they may have been replaced."""
        if self._known is None or not self._known.are_of(model):
            self._known = _Places(model)
        reshard(model)
        return {name: getattr(owner, leaf) for owner, leaf, name in self._known.places}

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = self.__dict__.copy()
        state["_known"] = None  # the model is no part of this
        return state


class _Places:
    """Where a model's tensors are, as long as its modules are the same: found once, as that takes longer than EMA."""

    def __init__(self, model: nn.Module) -> None:
        names = _collect(model).tensors
        owners = dict(model.named_modules(remove_duplicate=False))
        paths = ((*split_name(name), name) for name in names)
        self.places = [(owners[path], leaf, name) for path, leaf, name in paths]
        self._model, self._modules = model, list(model.modules())
        self._structure = self._structure_now()

    def are_of(self, model: Any) -> bool:
        """Whether they are where this model's tensors are now: it may have got other layers meanwhile."""
        if self._model is not model:
            return False
        return torch.compiler.is_compiling() or self._structure == self._structure_now()

    def _structure_now(self) -> list[Any]:
        found: list[Any] = []
        for m in self._modules:
            found.append([id(child) for child in m._modules.values()])
            found.append([name for name, t in m._parameters.items() if t is not None])
            if m._buffers:
                found.append([name for name, t in m._buffers.items() if t is not None])
        return found


def _collect(model: Any) -> Collection:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return collect("model", model, buffers=True)


def _shadows(shadows: Any, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' list by the names of the averages of parameters."""
    if not isinstance(shadows, (list, tuple)) or not all(
        isinstance(t, Tensor) and t.dtype in FLOATS for t in shadows
    ):
        raise TypeError("shadow_params must be a list of floating tensors")
    if len(shadows) != len(averages):
        raise ValueError(
            f"shadow_params holds {len(shadows)} tensors, the model has {len(averages)} parameters"
        )
    for (name, average), t in zip(averages.items(), shadows, strict=True):
        if t.shape != average.shape:
            raise ValueError(f"shadow_params has {shape(t)} for {name!r} of shape {shape(average)}")
    return dict(zip(averages, shadows, strict=True))


def _average_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_same(values: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    if values.keys() != averages.keys():
        missing = [name for name in averages if name not in values][:1]
        extra = [name for name in values if name not in averages][:1]
        parts = [f"it lacks {name!r}" for name in missing] + [f"it also has {name!r}" for name in extra]
        raise ValueError(f"model must have the names of the average: {'; '.join(parts)}")
    for name, average in averages.items():
        value = values[name]
        if value.shape != average.shape:
            raise ValueError(f"model's {name!r} has shape {shape(value)}, the average {shape(average)}")
        if value.is_floating_point() != average.is_floating_point():
            raise TypeError(f"model's {name!r} is {value.dtype}, the average {average.dtype}")


def _check_home(found: Mapping[str, Tensor], device: torch.device | None) -> None:
    for name, t in found.items():
        if device is not None and is_dtensor(t) and device.type != t.device.type:
            raise ValueError(
                f"model's {name!r} on {t.device} is split over ranks: its average is kept beside it, not on {device}"
            )


def _parts(
    owners: dict[str, Tensor], others: dict[str, Tensor], label: str, what: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of tensors that are split over ranks what is here, as the owners are split."""
    if not any_dtensor(owners.values()) and not any_dtensor(others.values()):
        return owners, others
    labels, of = [label.format(name) for name in owners], [what.format(name) for name in owners]
    here = parts(labels, list(owners.values()), of, [others[name] for name in owners])
    return tuple(dict(zip(owners, tensors, strict=True)) for tensors in here)  # type: ignore[return-value]


def _copy_(targets: dict[str, Tensor], sources: dict[str, Tensor], label: str, what: str) -> None:
    here, values = _parts(targets, sources, label, what)
    for name, t in here.items():
        t.copy_(values[name])
    count_writes(targets.values())


def _blend_(averages: list[Tensor], values: list[Tensor], decay: float | Tensor) -> None:
    """One pass for all of one device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for average, value in zip(averages, values, strict=True):
        lists = by_device.setdefault(average.device, ([], []))
        lists[0].append(average)
        lists[1].append(value)
    for device, (targets, sources) in by_device.items():
        if isinstance(decay, Tensor):
            alpha = decay.to(device).expand(len(targets))
            blend_inplace_op(targets, sources, [], alpha, [], None, [1.0])
        elif not (fast_lists.undisturbed() and fast_lists.lerp_or_blend_(targets, sources, decay)):
            blend_inplace_op(targets, sources, [decay] * len(targets), None, [], None, [1.0])
