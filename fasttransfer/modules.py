"""Around fine-tuning: which parameters are trained, and a new head for a new task."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from fasttransfer.names import _some, check_patterns, collect, matches

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# ------------------------------------------------------------------------------------------------ freeze and thaw


def freeze(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[str]:
    """Stop the training of parameters, and of the statistics of the normalizations that they belong to.

    ``requires_grad=False`` alone leaves a BatchNorm normalizing by the batch and updating its running statistics
    (pytorch#86590). Here a normalization with running statistics (BatchNorm, SyncBatchNorm, InstanceNorm) whose own
    parameters are all frozen is also held in eval mode, which ``model.train()`` does not undo, now or later: its class
    becomes a subclass (``FrozenBatchNorm2d``) with the same ``state_dict``, whose statistics nothing resets either
    (``torch.optim.swa_utils.update_bn``). One without parameters is selected by its module's name. Convert to
    SyncBatchNorm first: ``convert_sync_batchnorm`` makes new layers, which are not frozen. Dropout is left as it is:
    it belongs to the training of what comes behind it.

    Args:
        model: Modified in place.
        include: Names or glob patterns, of parameters (``"*.bias"``) or of modules, for everything under them
            (``"layer1"``, ``"backbone.*"``). A tied parameter goes by any of its names. Default: all.
        exclude: The same, of what is left as it is.

    Returns:
        The names of the parameters that were changed, and of the normalizations without parameters that were.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A pattern that matches nothing, a parameter that is not initialized yet (of a lazy module). Nothing
            has been modified then.

    Example:
        >>> new = replace_head(model, 5)
        >>> freeze(model, exclude=new)
        >>> optimizer = torch.optim.SGD(new.values(), lr=0.1)
    """
    params, norms = select(model, include, exclude)
    changed = []
    for name, p in params.items():
        if p.requires_grad or p.grad is not None:
            changed.append(name)
        p.requires_grad_(False)
        p.grad = None  # an optimizer applies what is left here, whatever requires_grad says
    for name, norm in norms.items():
        own = list(norm.parameters(recurse=False))
        if not isinstance(norm, _Frozen) and not any(p.requires_grad for p in own):
            norm.__class__ = _frozen(norm.__class__)
            norm.eval()
            changed += [] if own else [name]
    return changed


def thaw(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[str]:
    """Undo ``freeze``: train the (floating) parameters again, and the normalizations that they belong to.

    A normalization that ``freeze`` holds in eval mode is released as soon as one of its own parameters is thawed; it
    then follows ``model.training``, of the model given here. Everything selected is thawed, whoever froze it.

    Args:
        model: Modified in place.
        include: As in ``freeze``.
        exclude: As in ``freeze``.

    Returns:
        The names of the parameters that were changed, and of the normalizations without parameters that were.

    Raises:
        TypeError, ValueError: As ``freeze``; also for a normalization whose class has been changed since (by
            ``parametrize``). Nothing has been modified then.
    """
    params, norms = select(model, include, exclude)
    for name, norm in norms.items():
        if isinstance(norm, _Frozen) and type(norm) is not _frozen(_plain(type(norm))):
            raise ValueError(
                f"{name!r} was frozen and has become {_kind(norm)} since: undo that first (a parametrization by "
                "torch.nn.utils.parametrize.remove_parametrizations)"
            )
    changed = []
    for name, p in params.items():
        if (p.is_floating_point() or p.is_complex()) and not p.requires_grad:
            p.requires_grad_(True)
            changed.append(name)
    for name, norm in norms.items():
        if isinstance(norm, _Frozen):
            own = list(norm.parameters(recurse=False))
            norm.__class__ = _plain(type(norm))
            norm.train(model.training)
            changed += [] if own else [name]
    return changed


def select(
    model: Any, include: Any, exclude: Any, argument: str = "include"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters that are selected, and the normalizations of which a parameter (if any: the module) is.

    ``argument`` is what errors call ``include``; they are those of ``freeze``.
    """
    check_model(model)
    found = collect("model", model)
    norms: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase) and module.running_mean is not None:
            norms.setdefault(module, []).append(name)
    bare = {m: names for m, names in norms.items() if not any(True for _ in m.parameters(recurse=False))}
    targets = [*found.aliases, *(name for names in bare.values() for name in names)]
    # dict.fromkeys: each once, and parameters first, because an error lists the first ones.
    names = list(dict.fromkeys([*targets, *(path for name in targets for path in _paths(name))]))
    included = None if include is None else check_patterns(argument, include, names)
    excluded = check_patterns("exclude", exclude, names)

    def wanted(aliases: Iterable[str]) -> bool:
        paths = [path for name in aliases for path in (name, *_paths(name))]
        kept = included is None or any(matches(path, included) for path in paths)
        return kept and not any(matches(path, excluded) for path in paths)

    params = {name: p for name, p in found.tensors.items() if wanted(found.names_of(name))}
    chosen = {id(p) for p in params.values()}
    selected = {
        names[0]: m
        for m, names in norms.items()
        if (wanted(names) if m in bare else any(id(p) in chosen for p in m.parameters(recurse=False)))
    }
    lazy = [name for name, p in params.items() if is_lazy(p)]
    lazy += [name for name, m in selected.items() if is_lazy(m.running_mean)]
    if lazy:
        raise ValueError(f"model has {_some(lazy)} not initialized yet: run a batch through it first")
    return params, selected


def _paths(name: str) -> list[str]:
    """The names of the modules around a name: ``a.b`` and ``a`` for ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


class _Frozen(nn.Module):
    """Mixed into the class of a normalization: eval mode for good.

    A module itself because ``__class__`` can only be assigned between classes whose instances are laid out alike.
    """

    def train(self, mode: bool = True) -> Any:
        return super().train(False)

    def reset_running_stats(self) -> None:
        """Nothing: ``update_bn`` resets the statistics of all BatchNorms to have them estimated in train mode."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: made as an instance of the plain class, which can be imported, then frozen again."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        plain = [_plain(type(self)) if arg is type(self) else arg for arg in args]
        return (_rebuild, (make, *plain), *rest)


@cache  # one class for all modules of a class, or each would be a recompilation of its own
def _frozen(plain: Any) -> Any:
    # The module's name stays: torch.fx keeps a layer whole by that of torch.nn.
    return type(f"Frozen{plain.__name__}", (_Frozen, plain), {"__module__": plain.__module__})


def _plain(frozen: Any) -> Any:
    """The class that ``_frozen`` made ``frozen`` of."""
    return frozen.__mro__[frozen.__mro__.index(_Frozen) + 1]


def _rebuild(make: Callable[..., Any], *args: Any) -> Any:
    module = make(*args)
    module.__class__ = _frozen(module.__class__)
    return module


# --------------------------------------------------------------------------------------------------- replace_head


def replace_head(
    model: nn.Module, head: int | nn.Module, *, name: str | None = None
) -> dict[str, nn.Parameter]:
    """Give a model a new head, in place, for a task with other classes.

    Args:
        model: Modified in place; inside containers such as ``nn.Sequential`` too, and wherever it holds the old head.
        head: The number of outputs: a new ``nn.Linear``, or a convolution with the options of the old one where the
            old head is one, with its inputs, dtype and device, and a bias if it has one. Or a module, used as given.
        name: The head's module name (``"classifier.1"``). Default: the last module, in the order in which they were
            registered, that has parameters of its own; where that is no linear layer or convolution, one of the names
            that libraries give their heads. It is an error if the model has another head beside it (DeiT's
            ``head_dist``, Inception's ``AuxLogits.fc``): call once for each, by name.

    Returns:
        The parameters that the model did not have before, by their names in the model: for an optimizer group, for
        ``L2SP(model, 0.01, new=new, new_strength=0.001)``, for ``freeze(model, exclude=new)``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A name that the model does not have, the model itself as the head, a number that is not positive,
            an old head that is no linear layer or convolution where one is needed. Nothing has been modified then.
    """
    check_model(model)
    if not isinstance(head, nn.Module):
        head = _check_outputs(head)
    if name is None:
        name = _find_head(model)
    old = find_module("name", model, name)
    if old is model:
        raise ValueError("the head is the model itself: there is nothing to replace it in; make a new model")
    new = head if isinstance(head, nn.Module) else _like(old, name, head)
    inside = set(new.modules())
    places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is old]
    if model in inside or any(parent in inside for parent, _ in places):
        raise ValueError(f"head holds the model, or the part of it that {name!r} is in")
    before = {id(p) for p in model.parameters()}
    new.train(old.training)
    for parent, key in places:
        setattr(parent, key, new)
    own = {id(p) for p in new.parameters()} - before
    return {n: p for n, p in model.named_parameters() if id(p) in own}


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def find_module(argument: str, model: nn.Module, name: Any) -> nn.Module:
    """The module of this dotted name.

    Raises:
        TypeError: Not a string.
        ValueError: A name that the model does not have.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the dotted name of a module, got {name!r}")
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise ValueError(
            f"{argument}: model has no module {name!r}; its modules are, last first, {_some(names[::-1], 10)}"
        ) from None


def _check_outputs(head: Any) -> int:
    if isinstance(head, bool) or not hasattr(head, "__index__"):  # NumPy's integers are fine
        raise TypeError(f"head must be a number of outputs or a module, got {head!r}")
    outputs = operator.index(head)
    if outputs <= 0:
        raise ValueError(f"head must be a positive number of outputs, got {outputs}")
    return outputs


# For models whose last module with parameters is no head: XLM-RoBERTa registers the head before the body, RemBERT a
# norm behind it. Names of transformers, timm and torchvision; the longer ones first.
_HEADS = (
    "classifier.out_proj", "classifier", "score", "lm_head.decoder", "lm_head", "cls.predictions.decoder", "heads.head",
    "head.fc", "head", "fc", "last_linear",
)  # fmt: skip
# What a name of a second head has in it: aux_head, AuxLogits.fc, head_dist, distillation_classifier, head.0 ...
_SECOND_HEAD = re.compile(r"aux|head|classifier|(^|[._])(dist|distill|distillation)([._]|$)", re.IGNORECASE)


def _find_head(model: nn.Module) -> str:
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    if not owners:
        raise ValueError("model has no parameters, and so no head to find: pass name=")
    last = next(reversed(owners))
    layers = {n: m for n, m in owners.items() if isinstance(m, (nn.Linear, _ConvNd))}
    name = last if last in layers else next((n for n in _HEADS if n in layers), None)
    if name is None:
        raise ValueError(
            f"the last module with parameters is {last!r}, {_kind(owners[last])}, not a linear layer or a "
            "convolution: pass name= for the head"
        )
    others = [n for n, m in layers.items() if n != name and _is_second(model, n, m, name, layers[name])]
    if others:
        raise ValueError(
            f"model has {name!r} and {_some(others)} with as many outputs: if they are heads for the same classes, "
            "call replace_head for each with name=; if not, pass name= for the head"
        )
    return name


def _is_second(model: nn.Module, name: str, layer: nn.Module, head_name: str, head: nn.Module) -> bool:
    """Whether a layer looks like another head for the classes of ``head``."""
    if _outputs(layer) != _outputs(head) or not _SECOND_HEAD.search(name):
        return False
    parent = name.rpartition(".")[0]
    # One layer after the other, of one head.
    in_sequence = isinstance(model.get_submodule(parent), nn.Sequential)
    return not (in_sequence and parent == head_name.rpartition(".")[0])


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _like(old: nn.Module, name: str, outputs: int) -> nn.Module:
    """A new layer in the place of ``old`` with this many outputs."""
    if not isinstance(old, (nn.Linear, _ConvNd)):
        raise ValueError(
            f"{name!r} is {_kind(old)}, not a linear layer or a convolution: pass the new head as a module"
        )
    if is_lazy(old.weight):
        raise ValueError(f"{name!r} is not initialized yet: run a batch through the model first")
    options: dict[str, Any] = {
        "bias": old.bias is not None,
        "dtype": old.weight.dtype,
        "device": old.weight.device,
    }
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, outputs, **options)
    kept = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    kept += ["output_padding"] if isinstance(old, _ConvTransposeNd) else []
    options |= {option: getattr(old, option) for option in kept}
    kind = next(kind for kind in _CONVS if isinstance(old, kind))  # a subclass may take other arguments
    return kind(old.in_channels, outputs, **options)


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
