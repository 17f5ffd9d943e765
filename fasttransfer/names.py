"""Tensors by name: what counts as a collection of tensors, how two of them match, glob patterns over names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checks import shape, values_visible
from fasttransfer.sharded_params import reshard

Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor] | nn.Module


class Collection(NamedTuple):
    """The tensors of one argument."""

    argument: str
    kind: str  # "tensor", "list" or "named"
    tensors: dict[str, Tensor]  # by name, or by position; tied parameters of a module once
    aliases: dict[str, Tensor]  # as tensors, and tied parameters under all their names
    ties: dict[str, list[str]]  # of a name in tensors, the other names in aliases

    def names_of(self, name: str) -> list[str]:
        """All names of a tensor: its own first, then those of the parameters tied to it."""
        return [name, *self.ties.get(name, ())]

    @property
    def named(self) -> bool:
        """Whether the names mean something: not those of a list's positions."""
        return self.kind == "named"

    def label(self, name: str) -> str:
        """How an error names one of the tensors."""
        if self.kind == "tensor":
            return self.argument
        return f"{self.argument}[{name!r}]" if self.named else f"{self.argument}[{name}]"


class Labels(Sequence[str]):
    """What errors call the tensors of these names; made only when an error is."""

    def __init__(self, found: Collection, names: Sequence[str]) -> None:
        self._found, self._names = found, names

    def __getitem__(self, i: Any) -> Any:
        return self._found.label(self._names[i])

    def __len__(self) -> int:
        return len(self._names)


def collect(argument: str, value: Any, *, buffers: bool = False) -> Collection:
    """The tensors of an argument: of a tensor, a list or an iterator, a mapping, or a module.

    With ``buffers``, a module's persistent buffers come after its parameters (the others are derived state).

    Raises:
        TypeError: Something else, or a collection that holds something else than tensors.
    """
    if isinstance(value, Tensor):
        return Collection(argument, "tensor", {"0": value}, {"0": value}, {})
    if isinstance(value, nn.Module):
        return _of_module(argument, value, buffers)
    if isinstance(value, Mapping):
        kind, found_tensors = "named", dict(value)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        kind, found_tensors = "list", {str(i): t for i, t in enumerate(value)}
    else:
        raise TypeError(
            f"{argument} must be a tensor, a list of tensors, a dict of tensors or a module, "
            f"got {type(value).__name__}"
        )
    found = Collection(argument, kind, found_tensors, found_tensors, {})
    for name, t in found_tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"the names of {argument} must be strings, got {name!r}")
        if not isinstance(t, Tensor):
            raise TypeError(f"{found.label(name)} must be a tensor, got {type(t).__name__}")
    return found


def _of_module(argument: str, module: nn.Module, buffers: bool) -> Collection:
    found = Collection(argument, "named", {}, {}, {})
    first: dict[int, str] = {}
    reshard(module)
    owners = list(module.named_modules(remove_duplicate=False))
    for kind in ("_parameters", "_buffers") if buffers else ("_parameters",):
        for prefix, owner in owners:
            for leaf, t in getattr(owner, kind).items():
                if t is None or (kind == "_buffers" and leaf in owner._non_persistent_buffers_set):
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                found.aliases[name] = t
                known = first.setdefault(id(t), name)
                if known == name:
                    found.tensors[name] = t
                else:
                    found.ties.setdefault(known, []).append(name)
    return found


def match(a: Collection, b: Collection, *, transformed: Sequence[Any] | None = None) -> list[Tensor]:
    """The tensors of ``b`` in the order of ``a``: the same names (positions), shape for shape.

    ``transformed`` tells, in the order of ``a``, what is not None and will change the shape first.

    Raises:
        TypeError: Collections of different kinds.
        ValueError: A name that one side lacks, a different length, a different shape, another device.
    """
    if a.kind != b.kind:
        kinds = {"tensor": "a tensor", "list": "a list of tensors", "named": "a dict or a module"}
        raise TypeError(f"{b.argument} must be {kinds[a.kind]} as {a.argument} is, got {kinds[b.kind]}")
    if not a.named and len(a.tensors) != len(b.tensors):
        raise ValueError(
            f"{b.argument} must have as many tensors as {a.argument} ({len(a.tensors)}), got {len(b.tensors)}"
        )
    missing = [name for name in a.tensors if name not in b.aliases]
    extra = [name for name in b.tensors if name not in a.aliases]
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it also has {_some(extra)}"] * bool(extra)
        raise ValueError(f"{b.argument} must have the names of {a.argument}: {'; '.join(parts)}")
    matched = [b.aliases[name] for name in a.tensors]
    _check_tied(a, b)
    own = a.tensors.values()
    if [x.shape for x in own] == [y.shape for y in matched] and len({t.device for t in (*own, *matched)}) < 2:
        return matched
    for i, ((name, x), y) in enumerate(zip(a.tensors.items(), matched, strict=True)):
        if x.shape != y.shape and (transformed is None or transformed[i] is None):
            raise ValueError(f"{b.label(name)} has shape {shape(y)}, {a.label(name)} has {shape(x)}")
        if x.device != y.device:
            raise ValueError(f"{b.label(name)} is on {y.device}, {a.label(name)} on {x.device}")
    return matched


def _check_tied(a: Collection, b: Collection) -> None:
    """What ``a`` ties, ``b`` may not tell apart: one of its two tensors would be dropped without a word."""
    for name, others in a.ties.items():
        first = b.aliases[name]
        for other in others:
            t = b.aliases.get(other, first)
            same = t is first or t.data_ptr() == first.data_ptr()
            if not same and values_visible(t) and values_visible(first) and not torch.equal(t, first):
                raise ValueError(
                    f"{a.argument} ties {name!r} and {other!r}, {b.argument} has different tensors there"
                )


def check_patterns(argument: str, patterns: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Glob patterns (``"layer1.*"``), each of which must match a name: one that matches nothing is a typing error.

    Raises:
        TypeError: Not a string or a collection of strings.
        ValueError: A pattern that matches no name.
    """
    if patterns is None:
        return ()
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must be glob patterns over names, got {patterns!r}")
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = list(names)
    for pattern in given:
        if not isinstance(pattern, str):  # not its repr: that of a parameter is pages long
            raise TypeError(f"{argument} must be glob patterns over names, got a {type(pattern).__name__}")
        if not any(matches(name, (pattern,)) for name in names):
            raise ValueError(f"{argument}: {pattern!r} matches none of the names, which are {_some(names)}")
    return given


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is, or matches, one of the glob patterns."""
    return any(name == pattern or _glob(name, pattern) for pattern in patterns)


def _glob(name: str, pattern: str) -> bool:
    """Dynamo cannot trace fnmatch, and need not: of strings, the answer is a constant."""
    return fnmatchcase(name, pattern)


# All that torch.compiler.assume_constant_result does, but for importing Dynamo: as long again as importing torch.
_glob._dynamo_marked_constant = True  # type: ignore[attr-defined]


def by_name(
    argument: str, value: Any, found: Collection, names: Iterable[str], default: Any = ...
) -> list[Any]:
    """One value for each of ``names``: ``value`` itself, or that of the first pattern that matches in a mapping.

    Raises:
        TypeError: A mapping for tensors that have no names.
        ValueError: A pattern that matches no tensor of ``found``, or a name that no pattern matches without a default.
    """
    if not isinstance(value, Mapping):
        return [value for _ in names]
    if not found.named:
        raise TypeError(
            f"{argument} by name pattern needs names: pass a dict or a module, not tensors by position"
        )
    check_patterns(argument, tuple(value), found.aliases)
    values = []
    for name in names:
        aliases = found.names_of(name)
        hits = (v for pattern, v in value.items() if any(matches(alias, (pattern,)) for alias in aliases))
        hit = next(hits, default)
        if hit is ...:
            raise ValueError(f"{argument} has no pattern for {name!r}; add a last one '*' for all others")
        values.append(hit)
    return values


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
