"""What a blend of checkpoints will do to each tensor, and what does not match, known from the headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttransfer.checkpoint_files import BLENDED, ITEM_SIZES, Checkpoint, Entry, lay_out
from fasttransfer.checkpoint_maps import Rule, SourceMap
from fasttransfer.checks import check_number
from fasttransfer.names import matches
from fasttransfer.native import build_info
from fasttransfer.ops.library import reference_forced

# Other formats' weights: a copy beside the blended ones would be taken for them.
_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)


class Operand(NamedTuple):
    """A tensor and its coefficient."""

    entry: Entry
    coef: float
    rule: Rule | None = None  # how it is mapped first

    @property
    def mapped(self) -> bool:
        """Whether its values are other than those in the file."""
        return self.rule is not None and bool(self.rule.sides(len(self.entry.shape)))


class Job(NamedTuple):
    """What becomes of one tensor of the target."""

    name: str
    dtype: str  # of the output
    shape: tuple[int, ...]
    operands: list[Operand]  # those whose coefficient is not 0
    alpha: float | None  # None: not blended but copied
    why: str  # it is copied
    start: int = 0  # in the file that is written

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def numel(self) -> int:
        """Elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def copied(self) -> bool:
        """Whether the output is the bytes of the one operand."""
        one = self.operands[0]
        return len(self.operands) == 1 and one.coef == 1 and not one.mapped and one.entry.dtype == self.dtype


class OutputFile(NamedTuple):
    """A file that is written."""

    name: str
    header: bytes
    jobs: list[Job]  # in the order of their data

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(job.nbytes for job in self.jobs)


class Options(NamedTuple):
    """The checked arguments that are no checkpoints."""

    alpha: float | Mapping[str, float]
    weights: list[float]
    maps: list[SourceMap]
    dtype: str | None
    keep: tuple[str, ...]


class Plan:
    """The blend of a target with its sources: files, jobs, and in ``problems`` all that does not match."""

    def __init__(self, target: Checkpoint, sources: Sequence[Checkpoint], options: Options) -> None:
        self.target, self.sources, self.options = target, list(sources), options
        self.problems: list[str] = []
        self.unmatched: set[str] = set()  # names of the target that have one
        self.ignored: list[str] = []  # names of sources that `keep` leaves out
        self.ties: list[tuple[Entry, Entry, str]] = []  # must be equal, or else ...
        self.jobs = self._jobs()
        self.files = [] if self.problems else [self._file(i) for i in range(len(target.shards))]

    # ------------------------------------------------------------------------------------------ what is blended
    def _jobs(self) -> dict[str, Job]:
        names = [alias for name in self.target.tensors for alias in self.target.names_of(name)]
        everything = [*names, *(name for source in self.sources for name in source.tensors)]
        alphas = self._alphas(names)
        for pattern in self.options.keep:
            if not any(matches(name, [pattern]) for name in everything):
                raise ValueError(f"keep: {pattern!r} matches none of the names")
        for given in dict.fromkeys(self.options.maps):
            given.check(names)
        used: list[set[str]] = [set() for _ in self.sources]
        jobs = {}
        for name, entry in self.target.tensors.items():
            before = len(self.problems)
            jobs[name] = self._job(name, entry, alphas[name], used)
            if len(self.problems) > before:
                self.unmatched.add(name)
        for source, given, seen in zip(self.sources, self.options.maps, used, strict=True):
            self._check_extra(source, given, seen)
        return jobs

    def _alphas(self, names: Iterable[str]) -> dict[str, float | None]:
        """Of each tensor of the target; of one for which no pattern is given None."""
        alpha = self.options.alpha
        if not isinstance(alpha, Mapping):
            number = check_number("alpha", alpha, float("-inf"))
            return dict.fromkeys(self.target.tensors, number)
        numbers = {p: check_number(f"alpha[{p!r}]", v, float("-inf")) for p, v in alpha.items()}
        names = list(names)
        for pattern in numbers:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(f"alpha: {pattern!r} matches none of the target's names")
        return {
            name: next((v for p, v in numbers.items() if any(matches(n, [p]) for n in own)), None)
            for name, own in ((name, self.target.names_of(name)) for name in self.target.tensors)
        }

    def _job(self, name: str, entry: Entry, alpha: float | None, used: list[set[str]]) -> Job:
        dtype = self.options.dtype if self.options.dtype and entry.floating else entry.dtype
        own = [Operand(entry, 1.0)]
        if entry.dtype not in ITEM_SIZES:
            self.problems.append(f"{name}: {entry.dtype} is not supported ({_dtypes()})")
            return Job(name, entry.dtype, entry.shape, own, None, "unsupported")
        names = self.target.names_of(name)
        if any(matches(alias, self.options.keep) for alias in names):
            for source, given, seen in zip(self.sources, self.options.maps, used, strict=True):
                found = self._counterpart(names, source, given)
                if found is not None:
                    seen.add(found.name)
            return Job(name, dtype, entry.shape, own, None, "kept")
        operands = self._sources_of(name, entry, used)
        if not entry.floating:
            return Job(name, dtype, entry.shape, own, None, "integer")
        if alpha is None:
            self.problems.append(f"{name}: no alpha matches it; add '*=0.5', say, for all others")
            alpha = 1.0
        weights = [alpha, *((1 - alpha) * w for w in self.options.weights)]
        operands = [Operand(entry, 1.0), *operands]
        counted = [o._replace(coef=w) for o, w in zip(operands, weights, strict=False) if w]
        # The sum is taken around the first, best the one that weighs most (as `blend` does).
        counted.sort(key=lambda o: -abs(o.coef))
        return Job(name, dtype, entry.shape, counted, alpha, "")

    def _sources_of(self, name: str, entry: Entry, used: list[set[str]]) -> list[Operand]:
        """The sources' tensors for one of the target's; what is wrong with them goes to ``problems``."""
        operands = []
        names = self.target.names_of(name)
        for source, given, seen in zip(self.sources, self.options.maps, used, strict=True):
            found, rule = self._counterpart(names, source, given), given.rule(names)
            if found is None:
                other = given.source_name(name)
                called = "" if other == name else f", where the map looks for {other!r}"
                self.problems.append(f"{name}: not in {source.argument}{called}")
                continue
            seen.add(found.name)
            sides = Operand(found, 1.0, rule).mapped
            wrong = rule.problem(found.shape) if rule and sides else None
            shape = rule.mapped_shape(found.shape) if rule and not wrong else found.shape
            here = source.argument if found.name == name else f"{source.argument}[{found.name!r}]"
            if found.dtype not in ITEM_SIZES:
                self.problems.append(f"{name}: {here} is {found.dtype}, which is not supported ({_dtypes()})")
            elif found.floating != entry.floating:
                self.problems.append(
                    f"{name}: target is {entry}, {here} is {found}: only one can be averaged"
                )
            elif wrong:
                self.problems.append(f"{name}: {here} is {found}: {wrong}")
            elif shape != entry.shape:
                mapped = f", mapped to {list(shape)}" if sides else ""
                self.problems.append(f"{name}: target is {entry}, {here} is {found}{mapped}")
            operands.append(Operand(found, 1.0, rule))
        return operands

    @staticmethod
    def _counterpart(names: Sequence[str], source: Checkpoint, given: SourceMap) -> Entry | None:
        """The source's tensor for the target's of these names."""
        entries = (source.find(given.source_name(name)) for name in names)
        return next((entry for entry in entries if entry is not None), None)

    def _check_extra(self, source: Checkpoint, given: SourceMap, seen: set[str]) -> None:
        """What a source has beside: what the target ties must be equal there, all else is too much."""
        tied = {given.source_name(alias): kept for alias, kept in self.target.aliases.items()}
        for name, entry in source.tensors.items():
            if name in seen:
                continue
            first = None
            if name in tied:
                first = self._counterpart(self.target.names_of(tied[name]), source, given)
            if matches(name, self.options.keep):
                self.ignored.append(name)
            elif first is None:
                self.problems.append(f"{name}: in {source.argument}, not in target")
            else:
                why = f"{name}: the target ties it to {tied[name]!r}, {source.argument} has different tensors there"
                self.ties.append((first, entry, why))

    # ------------------------------------------------------------------------------------------ what is written
    def _file(self, i: int) -> OutputFile:
        shard = self.target.shards[i]
        tensors = [(e.name, self.jobs[e.name].dtype, e.shape) for e in shard.entries]
        header, starts = lay_out(tensors, shard.metadata)
        return OutputFile(
            shard.path.name, header, [self.jobs[name]._replace(start=at) for name, at in starts]
        )

    def index(self) -> tuple[str, bytes] | None:
        """Name and content of the index that is written."""
        if self.target.index_file is None:
            return None
        fields = json.loads(self.target.index_file.read_bytes())
        metadata = fields.get("metadata")
        sizes = sum(job.nbytes for job in self.jobs.values())
        fields["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sizes}
        return self.target.index_file.name, (json.dumps(fields, indent=2) + "\n").encode()

    def other_files(self) -> list[Path]:
        """What lies in the target's directory beside the weights: config.json, the tokenizer's files, ..."""
        folder = self.target.folder
        found = sorted(folder.iterdir()) if folder else []
        return [f for f in found if f.is_file() and f.name[0] != "." and not f.name.endswith(_WEIGHTS)]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(file.nbytes for file in self.files)

    def count(self) -> dict[str, int]:
        """How many tensors are ``"blended"``, ``"integer"`` or ``"kept"``; the latter two come from the target."""
        counts: dict[str, int] = {}
        for job in self.jobs.values():
            counts[job.why or "blended"] = counts.get(job.why or "blended", 0) + 1
        return counts

    def fingerprint(self) -> str:
        """What two runs must have in common for one to go on with the output of the other."""
        info = build_info()
        parts: list[Any] = [
            "fasttransfer",
            info["version"],
            info["torch"],
            info["simd_level"],
            reference_forced(),
        ]
        parts += [
            [(*shard.version, shard.digest) for shard in c.shards] for c in (self.target, *self.sources)
        ]
        parts += [given.stamp for given in self.options.maps]
        for file in self.files:
            parts.append([file.name, hashlib.sha256(file.header).hexdigest()])
            for job in file.jobs:
                parts.append([(o.entry.file.name, o.entry.start, o.coef) for o in job.operands])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------ what it looks like
    def listing(self) -> str:
        """All tensors that match, those that differ only in numbers on one line."""
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs.values():
            if job.name in self.unmatched:
                continue
            entry = self.target.tensors[job.name]
            key = (re.sub(r"\d+", "*", job.name), str(entry), self._from(job))
            groups.setdefault(key, []).append(job)
        rows = [
            (jobs[0].name if len(jobs) == 1 else name, f"x{len(jobs)}" if len(jobs) > 1 else "", shape, what)
            for (name, shape, what), jobs in groups.items()
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [
            f"  {name:{widths[0]}}  {times:>{widths[1]}}  {shape:{widths[2]}}  {what}".rstrip()
            for name, times, shape, what in rows
        ]
        return "\n".join(lines)

    def _from(self, job: Job) -> str:
        if job.alpha is None:
            return {"integer": "from the target (integers)", "kept": "from the target (--keep)"}.get(
                job.why, ""
            )
        dtype = f" -> {job.dtype}" if job.dtype != self.target.tensors[job.name].dtype else ""
        others = [
            o.entry.dtype + (f" mapped from {list(o.entry.shape)}" if o.mapped else "")
            for o in job.operands
            if o.entry is not self.target.tensors[job.name]
        ]
        with_others = f" with {' '.join(others)}" if others else ""
        return f"alpha {job.alpha:g}{with_others}{dtype}"


def _dtypes() -> str:
    return f"blended: {', '.join(BLENDED)}; copied: integers and BOOL"
