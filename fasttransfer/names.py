"""Tensors by name: what counts as a collection of tensors, how two of them match, glob patterns over names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checks import shape, values_visible

Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor] | nn.Module


class Collection(NamedTuple):
    """The tensors of one argument."""

    argument: str
    kind: str  # "tensor", "list" or "named"
    tensors: dict[str, Tensor]  # by name, or by position; tied parameters of a module once
    aliases: dict[str, Tensor]  # as tensors, and tied parameters under all their names

    def names_of(self, name: str) -> list[str]:
        """All names of a tensor: its own first, then those of the parameters tied to it."""
        t = self.tensors[name]
        return [name, *(other for other, x in self.aliases.items() if x is t and other != name)]

    @property
    def tied(self) -> bool:
        """Whether a tensor has more than one name."""
        return len(self.aliases) > len(self.tensors)

    @property
    def named(self) -> bool:
        """Whether the names mean something: not those of a list's positions."""
        return self.kind == "named"

    def label(self, name: str) -> str:
        """How an error names one of the tensors."""
        if self.kind == "tensor":
            return self.argument
        return f"{self.argument}[{name!r}]" if self.named else f"{self.argument}[{name}]"


def collect(argument: str, value: Any, *, buffers: bool = False) -> Collection:
    """The tensors of an argument: of a tensor, a list or an iterator, a mapping, or a module.

    With ``buffers``, a module's persistent buffers come after its parameters (the others are derived state).

    Raises:
        TypeError: Something else, or a collection that holds something else than tensors.
    """
    if isinstance(value, Tensor):
        return Collection(argument, "tensor", {"0": value}, {"0": value})
    if isinstance(value, nn.Module):
        tensors: dict[str, Tensor] = {}
        tensors.update(value.named_parameters())
        aliases: dict[str, Tensor] = {}
        aliases.update(value.named_parameters(remove_duplicate=False))
        if buffers:
            persistent = value.state_dict(keep_vars=True)
            tensors.update((name, t) for name, t in value.named_buffers() if name in persistent)
            aliases.update(
                (name, t) for name, t in value.named_buffers(remove_duplicate=False) if name in persistent
            )
        return Collection(argument, "named", tensors, aliases)
    if isinstance(value, Mapping):
        kind, found_tensors = "named", dict(value)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        kind, found_tensors = "list", {str(i): t for i, t in enumerate(value)}
    else:
        raise TypeError(
            f"{argument} must be a tensor, a list of tensors, a dict of tensors or a module, "
            f"got {type(value).__name__}"
        )
    found = Collection(argument, kind, found_tensors, found_tensors)
    for name, t in found_tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"the names of {argument} must be strings, got {name!r}")
        if not isinstance(t, Tensor):
            raise TypeError(f"{found.label(name)} must be a tensor, got {type(t).__name__}")
    return found


def match(a: Collection, b: Collection, *, shapes: bool = True) -> list[Tensor]:
    """The tensors of ``b`` in the order of ``a``: the same names (positions), shape for shape.

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
    if a.tied:
        _check_tied(a, b)
    for (name, x), y in zip(a.tensors.items(), matched, strict=True):
        if shapes and x.shape != y.shape:
            raise ValueError(f"{b.label(name)} has shape {shape(y)}, {a.label(name)} has {shape(x)}")
        if x.device != y.device:
            raise ValueError(f"{b.label(name)} is on {y.device}, {a.label(name)} on {x.device}")
    return matched


def _check_tied(a: Collection, b: Collection) -> None:
    """What ``a`` ties, ``b`` may not tell apart: one of its two tensors would be dropped without a word."""
    for name in a.tensors:
        first = b.aliases[name]
        for other in a.names_of(name)[1:]:
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
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be glob patterns over names, got {pattern!r}")
        if not any(matches(name, (pattern,)) for name in names):
            raise ValueError(f"{argument}: {pattern!r} matches none of the names, which are {_some(names)}")
    return given


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is, or matches, one of the glob patterns."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


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
        aliases = found.names_of(name) if found.tied else [name]
        hits = (v for pattern, v in value.items() if any(matches(alias, (pattern,)) for alias in aliases))
        hit = next(hits, default)
        if hit is ...:
            raise ValueError(f"{argument} has no pattern for {name!r}; add a last one '*' for all others")
        values.append(hit)
    return values


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
