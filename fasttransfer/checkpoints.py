"""Blending checkpoints on disk, tensor by tensor, in bounded memory: ``python -m fasttransfer blend``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from fasttransfer.checkpoint_files import BLENDED, Checkpoint, FileVersion, open_checkpoint
from fasttransfer.checkpoint_maps import MapArgument, SourceMap
from fasttransfer.checkpoint_output import Output
from fasttransfer.checkpoint_plan import Options, Plan
from fasttransfer.checkpoint_stream import Stream, same_data
from fasttransfer.checks import check_number
from fasttransfer.progress import progress_bar

__all__ = ["BlendedCheckpoint", "blend_checkpoints", "plan_blend"]

PathArgument = str | PathLike[str]
_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in BLENDED.items()}
_SHOWN_PROBLEMS = 20


class BlendedCheckpoint(NamedTuple):
    """What ``blend_checkpoints`` has written."""

    output: Path
    counts: dict[str, int]  # of tensors: "blended", and from the target: "integer", "kept"
    nbytes: int
    resumed: int  # bytes of them that an interrupted run had written
    restarted: (
        bool  # an interrupted run of another blend was at work on this output, and its part was removed
    )
    files: list[str]  # that were copied from the target's directory


def blend_checkpoints(
    target: PathArgument,
    sources: PathArgument | Sequence[PathArgument],
    alpha: float | Mapping[str, float],
    output: PathArgument,
    *,
    weights: Sequence[float] | None = None,
    map: MapArgument | Sequence[MapArgument] = None,
    dtype: str | torch.dtype | None = None,
    keep: str | Sequence[str] = (),
    progress: bool | None = None,
) -> BlendedCheckpoint:
    """``alpha * target + (1 - alpha) * sum_i w_i source_i`` of safetensors checkpoints, written to ``output``.

    Reads, blends and writes a few MB at a time: memory does not grow with the checkpoints (a mapped tensor is held
    whole). Floating tensors are computed in fp32 (fp64 if an operand or the output is) and rounded once; integer and
    bool tensors are the target's. Nothing is written before names, shapes and dtypes have been found to match. The
    output appears whole or not at all; after an interruption the same call goes on from ``<output>.partial/``, with
    the same bytes as a result (judged by the arguments, and the inputs' headers, sizes and times).

    Args:
        target: A ``.safetensors`` file, a ``.safetensors.index.json``, or a directory that holds one of them.
        sources: One or several; sharded as they like.
        alpha: The weight of the target, or ``{name pattern: alpha}``, the first match winning.
        output: A directory (new or empty), or, for a target of one file, a new ``.safetensors`` file. Files and shards
            are called as the target's. Metadata is the target's too, and so are the other files of a target directory
            (config.json, tokenizer, ...) but for hidden ones, directories and weights in other formats.
        weights: One number per source, summing to 1; default equal.
        map: Where a source differs: a JSON file or a dict ``{pattern: rule}`` for names of the target (``*`` is the
            wildcard, the first match wins), or one per source. A rule is the source's name, whose stars stand for
            what those of the pattern matched; or a ``LinearMap`` (the path of its saved state dict, relative to the
            JSON file, in Python also the module or a matrix), short for ``{"columns": map}``; or a dict of ``name``,
            ``rows``, ``columns``: ``W_t = A W_s B^T`` with A of the rows (first dimension), B of the columns
            (second). Of a vector, which has one side: ``A v``, plus the map's bias if it has one.
        dtype: Of the floating tensors of the output, ``"bfloat16"`` say; default the target's.
        keep: Glob patterns: these tensors are the target's, whatever the sources have under that name.
        progress: A progress bar on stderr: True, False, or None: if rich is installed and stderr is a terminal.

    Returns:
        What was written, and what was resumed.

    Raises:
        ValueError: All that does not match, by name with both shapes or dtypes; unsupported dtypes (float8, complex);
            files that are no sound checkpoints; arguments out of range.
        TypeError: Arguments of another type.
        FileNotFoundError: An input that is not there.
        FileExistsError: There is something at ``output`` already.
        ImportError: safetensors is not installed (``pip install 'fasttransfer[checkpoints]'``).
        OSError: What reading and writing may run into. What was written until then stays for the next run.
    """
    plan = plan_blend(target, sources, alpha, weights=weights, map=map, dtype=dtype, keep=keep)
    if plan.problems:
        raise ValueError(problems_text(plan))
    return run(plan, output, progress)


def plan_blend(
    target: PathArgument,
    sources: PathArgument | Sequence[PathArgument],
    alpha: float | Mapping[str, float],
    *,
    weights: Sequence[float] | None = None,
    map: MapArgument | Sequence[MapArgument] = None,
    dtype: str | torch.dtype | None = None,
    keep: str | Sequence[str] = (),
) -> Plan:
    """What ``blend_checkpoints`` would do, from the headers alone: ``.listing()``, ``.problems``, ``.nbytes``.

    Raises:
        As ``blend_checkpoints``, but for what does not match: that is in ``.problems``.
    """
    paths = [sources] if isinstance(sources, (str, PathLike)) else list(sources)
    shares = _weights(weights, len(paths))
    maps = list(map) if isinstance(map, Sequence) and not isinstance(map, str) else [map]
    if len(maps) not in (1, len(paths)):
        raise ValueError(
            f"map must be one for all sources, or one per source ({len(paths)}), got {len(maps)}"
        )
    labels = ["map"] if len(maps) == 1 else [f"map[{i}]" for i in range(len(maps))]
    loaded = [SourceMap(label, given) for label, given in zip(labels, maps, strict=True)]
    loaded = loaded * len(paths) if len(loaded) == 1 else loaded
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    options = Options(alpha, shares, loaded, _dtype(dtype), kept)
    arguments = ["source"] if len(paths) == 1 else [f"source {i + 1}" for i in range(len(paths))]
    opened = [open_checkpoint(argument, path) for argument, path in zip(arguments, paths, strict=True)]
    plan = Plan(open_checkpoint("target", target), opened, options)
    plan.problems += [why for first, other, why in plan.ties if not same_data(first, other)]
    return plan


def problems_text(plan: Plan) -> str:
    """The problems, one a line."""
    shown, count = plan.problems[:_SHOWN_PROBLEMS], len(plan.problems)
    lines = [f"  {problem}" for problem in shown]
    lines += [f"  ... and {count - len(shown)} more"] if count > len(shown) else []
    return "\n".join([f"the checkpoints do not match ({count} problem{'s' * (count > 1)}):", *lines])


def run(plan: Plan, output: PathArgument, progress: bool | None) -> BlendedCheckpoint:
    """Carry out a plan without problems."""
    path, single = _output_path(plan, output)
    out = Output(path, single, plan.fingerprint())
    resumed = 0
    others = [] if single or plan.target.folder is None else plan.other_files()
    index = plan.index()
    if not out.open():
        try:
            _check_space(plan, out)
            todo = [(file, out.done(file.name)) for file in plan.files]
            resumed = sum(done for _, done in todo)
            with (
                progress_bar(plan.nbytes // 1_000_000, "blending, MB", progress) as bar,
                Stream(plan.files, len(plan.sources)) as stream,
            ):
                count = _Megabytes(bar.advance)
                for file, done in todo:
                    stream.write(
                        file,
                        out.files / file.name,
                        done,
                        partial(out.record, file.name),
                        count.advance,
                    )
            _check_unchanged((plan.target, *plan.sources))
            for other in others:
                out.copy(other)
            names = [other.name for other in others]
            if index is not None:
                out.add(*index)
                names.append(index[0])
            out.publish([file.name for file in plan.files], names)
        finally:
            out.release()
    return BlendedCheckpoint(
        path, plan.count(), plan.nbytes, resumed, out.restarted, [f.name for f in others]
    )


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ValueError("sources must be at least one checkpoint, got none")
    if weights is None:
        return [1 / count] * count
    values = [check_number(f"weights[{i}]", w, float("-inf")) for i, w in enumerate(weights)]
    if len(values) != count:
        raise ValueError(f"weights must be one number per source ({count}), got {len(values)}")
    total = sum(values)
    if not abs(total - 1) <= 1e-6:
        raise ValueError(f"weights must sum to 1, got a sum of {total:g}")
    return [w / total for w in values]


def _output_path(plan: Plan, output: PathArgument) -> tuple[Path, bool]:
    path = Path(os.path.abspath(output))
    single = path.suffix == ".safetensors"
    if single and plan.target.index_file is not None:
        raise ValueError(f"output must be a directory for a target with an index, got {output}")
    return path, single


def _check_space(plan: Plan, out: Output) -> None:
    there = sum(f.stat().st_size for f in out.files.iterdir())
    free, needed = shutil.disk_usage(out.files).free, plan.nbytes - there
    if free < needed:
        raise OSError(f"{out.path} needs {needed / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB")


def _check_unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    for shard in (shard for checkpoint in checkpoints for shard in checkpoint.shards):
        if FileVersion.of(shard.path) != shard.version:
            raise OSError(f"{shard.path} was changed while it was read; start again")


def _dtype(dtype: str | torch.dtype | None) -> str | None:
    if dtype is None:
        return None
    name = _DTYPES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    return name


class _Megabytes:
    """Bytes in steps of a bar that counts megabytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._bytes = advance, 0

    def advance(self, nbytes: int) -> None:
        before = self._bytes // 1_000_000
        self._bytes += nbytes
        if self._bytes // 1_000_000 > before:
            self._advance(self._bytes // 1_000_000 - before)
