"""Where a target's tensor comes from in a source: under another name, and through linear maps of its two sides."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checkpoint_files import BLENDED, Entry, FileVersion, open_checkpoint

MapArgument = str | PathLike[str] | Mapping[str, Any] | None
_FIELDS = ("name", "rows", "columns")


class Side(NamedTuple):
    """A linear map ``[d_target, d_source]`` of one dimension: a saved ``LinearMap``, or one that was passed."""

    label: str
    weight: Entry | Tensor
    bias: Entry | Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of that dimension in the target and in the source."""
        d_target, d_source = self.weight.shape
        return int(d_target), int(d_source)

    def load(self, which: str, dtype: torch.dtype) -> Tensor | None:
        """``weight`` or ``bias``."""
        value = getattr(self, which)
        if isinstance(value, Entry):
            data = bytearray(value.nbytes)
            with open(value.file, "rb") as file:
                file.seek(value.start)
                if file.readinto(data) != value.nbytes:
                    raise OSError(f"{value.file} has become shorter")
            flat = torch.frombuffer(data, dtype=BLENDED[value.dtype]) if data else torch.empty(0)
            value = flat.reshape(value.shape)
        return None if value is None else value.to("cpu", dtype)


class Rule(NamedTuple):
    """What holds for the target names that a pattern matches."""

    regex: re.Pattern[str]
    name: str | None  # in the source; its stars stand for what those of the pattern matched
    rows: Side | None
    columns: Side | None

    def sides(self, dims: int) -> list[tuple[int, Side]]:
        """The maps and the dimension that each maps: the first and the second, of a vector its one."""
        given = [(0, self.rows)] if self.rows else []
        given += [(min(1, dims - 1), self.columns)] if self.columns else []
        return [(dim, side) for dim, side in given if side is not None]

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a source tensor of this shape cannot be mapped."""
        sides = self.sides(len(shape))
        if sides and not shape:
            return "it has no dimension to map"
        if len(sides) > len(shape):
            return "rows and columns are both given for a vector"
        for dim, side in sides:
            if shape[dim] != side.sizes[1]:
                return f"{side.label} maps {side.sizes[1]} -> {side.sizes[0]}, its dimension {dim} is {shape[dim]}"
        return None

    def mapped_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a source tensor of ``shape`` is mapped to."""
        new = list(shape)
        for dim, side in self.sides(len(shape)):
            new[dim] = side.sizes[0]
        return tuple(new)

    def apply(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """``A W B^T`` of a matrix (along its first two dimensions of a kernel), ``A v + bias`` of a vector."""
        out = source.to(dtype)
        for dim, side in self.sides(source.dim()):
            weight = side.load("weight", dtype)
            assert weight is not None
            out = torch.tensordot(weight, out, ([1], [dim])).movedim(0, dim)
            # An offset of features is one of a layer's bias; of its weights it is none.
            bias = side.load("bias", dtype) if source.dim() == 1 else None
            out = out if bias is None else out + bias
        return out.contiguous()


class SourceMap:
    """The rules for one source; without any, names are the same on both sides."""

    def __init__(self, argument: str, given: MapArgument) -> None:
        self.argument = argument
        self.rules: dict[str, Rule] = {}
        folder, self.stamp = Path(), ""
        if given is None:
            return
        digest = hashlib.sha256()
        if not isinstance(given, Mapping):
            folder, text = Path(given).parent, _read(argument, Path(given))
            digest.update(text)
            given = _parsed(argument, Path(given), text)
        for pattern, value in given.items():
            self.rules[pattern] = self._rule(pattern, value, folder)
            digest.update(repr((pattern, self.rules[pattern].name)).encode())
            for side in (self.rules[pattern].rows, self.rules[pattern].columns):
                digest.update(b"-" if side is None else _content(side))
        self.stamp = digest.hexdigest()

    def _rule(self, pattern: str, value: Any, folder: Path) -> Rule:
        where = f"{self.argument}[{pattern!r}]"
        if isinstance(value, str) and not value.endswith(".safetensors"):
            value = {"name": value}
        elif not isinstance(value, Mapping):
            value = {"columns": value}
        unknown = set(value) - set(_FIELDS)
        if unknown or not value:
            raise ValueError(
                f"{where} must have some of {', '.join(_FIELDS)}, got {sorted(unknown) or 'none'}"
            )
        name = value.get("name")
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"{where}: name must be a string, got {name!r}")
        if name is not None and name.count("*") not in (0, pattern.count("*")):
            raise ValueError(
                f"{where}: {name!r} must have as many * as the pattern ({pattern.count('*')}), or none"
            )
        sides = [_side(f"{where}: {key}", value.get(key), folder) for key in _FIELDS[1:]]
        regex = re.compile("(.*?)".join(map(re.escape, pattern.split("*"))), re.DOTALL)
        return Rule(regex, name, *sides)

    def rule(self, names: Iterable[str]) -> Rule | None:
        """The first rule that matches one of a tensor's names."""
        names = list(names)
        return next((r for r in self.rules.values() if any(map(r.regex.fullmatch, names))), None)

    def source_name(self, name: str) -> str:
        """The name in the source of what the target calls ``name``."""
        rule = self.rule([name])
        if rule is None or rule.name is None:
            return name
        match = rule.regex.fullmatch(name)
        assert match is not None
        first, *others = rule.name.split("*")
        return first + "".join(found + part for found, part in zip(match.groups(), others, strict=False))

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError for a pattern that matches none of the target's names: it is a typing error."""
        names = list(names)
        for pattern, rule in self.rules.items():
            if not any(map(rule.regex.fullmatch, names)):
                raise ValueError(f"{self.argument}: {pattern!r} matches none of the target's names")


def _read(argument: str, path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    return path.read_bytes()


def _parsed(argument: str, path: Path, text: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{argument}: {path} must hold an object {{pattern: rule}}, got {type(parsed).__name__}"
        )
    return parsed


def _side(where: str, value: Any, folder: Path) -> Side | None:
    if value is None:
        return None
    weight: Entry | Tensor | None
    bias: Entry | Tensor | None
    if isinstance(value, (str, PathLike)):
        opened = open_checkpoint(where, folder / value)
        label, weight, bias = Path(value).name, opened.tensors.get("weight"), opened.tensors.get("bias")
    elif isinstance(value, Tensor):
        label, weight, bias = "the matrix", value.detach(), None
    elif isinstance(value, nn.Linear):
        label, weight = type(value).__name__, value.weight.detach()
        bias = None if value.bias is None else value.bias.detach()
    else:
        raise TypeError(f"{where} must be a saved LinearMap (a path), a LinearMap or a matrix, got {value!r}")
    if weight is None or len(weight.shape) != 2:
        raise ValueError(f"{where}: {label} must have a weight [d_target, d_source]")
    for part in (weight, bias):
        dtype = part.dtype if part is not None else "F32"
        if dtype not in BLENDED and dtype not in BLENDED.values():
            raise TypeError(f"{where}: {label} must be of floating dtype, got {dtype}")
    return Side(label, weight, bias)


def _content(side: Side) -> bytes:
    """What tells a map from another one."""
    digest = hashlib.sha256()
    for part in (side.weight, side.bias):
        if isinstance(part, Entry):
            digest.update(repr(FileVersion.of(part.file)).encode())
        elif part is not None:
            t = part.to("cpu", torch.float64).contiguous()
            digest.update(f"{list(t.shape)}".encode() + ctypes.string_at(t.data_ptr(), t.nbytes))
    return digest.digest()
