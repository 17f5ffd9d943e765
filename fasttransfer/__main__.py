"""``python -m fasttransfer blend`` and ``python -m fasttransfer info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fasttransfer import checkpoints
from fasttransfer.checkpoint_plan import Plan
from fasttransfer.info import as_text, system_info


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fasttransfer", description="Knowledge transfer between models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="blend | info")
    blend = commands.add_parser(
        "blend",
        help="blend safetensors checkpoints",
        description="alpha * target + (1 - alpha) * sources, tensor by tensor, in bounded memory. "
        "An interrupted run is resumed by the same command.",
    )
    add = blend.add_argument
    add("--target", required=True, metavar="PATH", help="a .safetensors file, an index, or a directory")
    add(
        "--source",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="one or several of the same",
    )
    add("--weights", nargs="+", type=float, metavar="W", help="one per source, summing to 1; default equal")
    add(
        "--alpha",
        required=True,
        action="append",
        metavar="[PATTERN=]A",
        help="the weight of the target, 1: unchanged; may be repeated with name patterns, 'layer1.*=0.9' '*=0.5'",
    )
    add("-o", "--output", metavar="PATH", help="a new directory, or a new .safetensors file")
    add(
        "--map",
        action="append",
        metavar="JSON",
        help="names and linear maps of the sources: one for all, or one each",
    )
    add(
        "--dtype",
        help="of the output's floating tensors: float32, bfloat16, float16, float64; default the target's",
    )
    add("--keep", action="append", default=[], metavar="PATTERN", help="tensors that stay the target's")
    add("--dry-run", action="store_true", help="list what matches and what does not, write nothing")
    add("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    info = commands.add_parser("info", help="build, devices and versions, for a bug report")
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _alpha(values: Sequence[str]) -> float | dict[str, float]:
    """A number, or numbers by pattern; a number among patterns is for all others."""
    found: dict[str, float] = {}
    for value in values:
        pattern, _, number = value.rpartition("=")
        try:
            found[pattern or "*"] = float(number)
        except ValueError:
            raise ValueError(f"--alpha must be a number or PATTERN=number, got {value!r}") from None
    return found["*"] if list(found) == ["*"] else found


def _blend(args: argparse.Namespace) -> int:
    if not (args.output or args.dry_run):
        raise ValueError("-o is missing: where to write to")
    options = {"weights": args.weights, "map": args.map, "dtype": args.dtype, "keep": args.keep}
    plan = checkpoints.plan_blend(args.target, args.source, _alpha(args.alpha), **options)
    if args.dry_run:
        print(_preview(plan))
    if plan.problems:
        print(f"error: {checkpoints.problems_text(plan)}", file=sys.stderr)
        return 2
    if args.dry_run:
        return 0
    begin = time.monotonic()
    done = checkpoints.run(plan, args.output, False if args.quiet else None)
    if not args.quiet:
        if done.restarted:
            print("(an interrupted run had been another blend: started over)", file=sys.stderr)
        counts = _counts(done.counts)
        resumed = f", {_size(done.resumed)} of it from an interrupted run" if done.resumed else ""
        seconds = time.monotonic() - begin
        print(f"{args.output}: {counts}; {_size(done.nbytes)}{resumed}, {seconds:.1f} s")
        if done.files:
            print(f"copied from the target: {', '.join(done.files)}")
    return 0


def _preview(plan: Plan) -> str:
    rows = [
        (c.argument, str(c.path), f"{len(c.tensors)} tensors", _size(c.nbytes))
        for c in (plan.target, *plan.sources)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    weights = ["", *(f"weight {w:.4g}" if len(plan.sources) > 1 else "" for w in plan.options.weights)]
    lines = [
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {w}".rstrip()
        for (a, b, c, d), w in zip(rows, weights, strict=True)
    ]
    lines += ["", plan.listing()] if plan.listing() else []
    if plan.problems:
        return "\n".join(lines)
    lines += ["", f"would write {_size(plan.nbytes)}: {_counts(plan.count())}"]
    others = [file.name for file in plan.other_files()]
    lines += [f"would copy {', '.join(others)} (into an output directory)"] if others else []
    if plan.ignored:
        lines.append(f"left out of the sources (--keep): {', '.join(dict.fromkeys(plan.ignored))}")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    words = {"blended": "blended", "integer": "integers copied", "kept": "kept from the target"}
    parts = [f"{counts[key]} {word}" for key, word in words.items() if counts.get(key)]
    return f"{sum(counts.values())} tensors ({', '.join(parts) or 'none'})"


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} bytes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 2 for what the arguments or inputs are wrong about, 1 for what fails later."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "info":
            info = system_info()
            print(json.dumps(info, indent=2) if args.json else as_text(info))
            return 0
        return _blend(args)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, BlockingIOError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        work = Path(args.output).absolute() if args.command == "blend" and args.output else None
        if work is not None and work.with_name(work.name + ".partial").exists():
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
