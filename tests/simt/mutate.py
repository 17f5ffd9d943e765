"""Change each barrier, mask and bound of the kernels, one at a time: does a standalone case notice?

    python -m tests.simt.mutate                  # all; writes mutants.md, exit status 1 where one survives unexplained
    python -m tests.simt.mutate kd.cuh blend.cuh # of these files only; writes nothing

All mutants are in one program, compiled once per sanitizer, and chosen when it runs (mutations.py, mutant.h). A mutant
is run plain, then under AddressSanitizer, then under ThreadSanitizer, until one fails; in those cases only where a
first run, the census, found that it makes a difference. Those that none can tell from the original, because there is
no difference, are listed with the reason in equivalents.toml. What was found out is kept in build/simt/mutants, so
that a run can be continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import tomllib

from fasttransfer.progress import progress_bar
from tests.simt import build
from tests.simt.mutations import NOT_KERNELS, Key, Mutant, choosable, mutants_of

ROOT = build.ROOT
KERNELS = ROOT / "csrc/cuda"
HERE = Path(__file__).resolve().parent
FOLDER = "build/simt/mutants"
SUMMARY = HERE / "mutants.md"
EQUIVALENTS = HERE / "equivalents.toml"
PROGRAMS = build.Programs(
    folder=FOLDER,
    # UBSan and the cases judge an index out of range, not an optimizer that takes it to be impossible.
    flags=(f"-I{FOLDER}/csrc", *build.FLAGS, "-w", "-fno-aggressive-loop-optimizations"),
    machine=(*build.MACHINE, "tests/simt/mutant.cpp"),
)
# A barrier only orders memory; a mask is checked by the machine.
SANITIZERS = {"barrier": ("plain", "tsan"), "mask": ("plain",), "others": ("plain", "asan", "tsan")}
SURVIVED = "survived"
POOL = ThreadPoolExecutor(2)
Reasons = dict[Key, str]


def sanitizers_of(mutant: Mutant) -> tuple[str, ...]:
    return SANITIZERS.get("barrier" if "barrier" in mutant.kind else mutant.kind, SANITIZERS["others"])


class Log:
    """What has been found out, by program, sanitizer and mutant, as long as none of their sources changes."""

    def __init__(self) -> None:
        self._path = ROOT / FOLDER / "known.json"
        self._known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._lock = threading.Lock()

    def get(self, *key: str) -> object:
        return self._known.get("|".join(key))

    def put(self, value: object, *key: str) -> None:
        with self._lock:
            self._known["|".join(key)] = value
            self._path.write_text(json.dumps(self._known, indent=0))


class Bench:
    """The programs that hold all mutants, and what they say of each."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
        self.names = [name for name in build.names() if name.startswith("cases_")]
        self.hashes = {name: self._hash(name) for name in self.names}
        self.log = Log()
        self._write()
        self._census: dict[tuple[str, str], tuple[set[int], float]] = {}

    def _hash(self, name: str) -> str:
        h = hashlib.sha256(repr((PROGRAMS, build.SANITIZERS)).encode())
        for file in files_of(name):
            h.update((ROOT / file).read_bytes())
        return h.hexdigest()[:16]

    def _write(self) -> None:
        """The copies of the kernels; only where they change, so that ninja does no more."""
        by_file: dict[str, dict[int, Mutant]] = {}
        for mutant, number in self.numbers.items():
            by_file.setdefault(mutant.file, {})[number] = mutant
        folder = ROOT / FOLDER / "csrc/cuda"
        folder.mkdir(parents=True, exist_ok=True)
        for file, mutants in by_file.items():
            text = choosable((KERNELS / file).read_text(), mutants)
            copy = folder / file
            if not copy.exists() or copy.read_text() != text:
                copy.write_text(text)

    def programs_of(self, file: str) -> list[str]:
        """Those that use the file: cases_kd, which is every kernel at once, only where it must."""
        using = [name for name in self.names if f"csrc/cuda/{file}" in files_of(name)]
        return [name for name in using if name != "cases_kd"] or using

    def prepare(self, sanitizer: str, mutants: list[Mutant]) -> None:
        """Compiles what these need, and takes the census."""
        names = {name for mutant in mutants for name in self.programs_of(mutant.file)}
        PROGRAMS.build((name, sanitizer) for name in sorted(names))
        for name, count in zip(
            sorted(names), POOL.map(lambda n: self._count(n, sanitizer), sorted(names)), strict=True
        ):
            self._census[name, sanitizer] = count

    def _count(self, name: str, sanitizer: str) -> tuple[set[int], float]:
        """The numbers of the mutants that make a difference, and the seconds of processor time of a run."""
        done = self._run(name, sanitizer, "census", 3600)
        if done.returncode != 0:
            raise RuntimeError(f"{name} {sanitizer} fails without a mutant:\n{done.stdout[-4000:]}")
        differs = {int(line.split()[1]) for line in done.stdout.splitlines() if line.endswith("differs")}
        return differs, float(done.stdout.split()[-1])

    def stops(self, mutant: Mutant, sanitizer: str) -> bool:
        """Whether a program fails with this mutant."""
        key = (sanitizer, mutant.file, mutant.before, mutant.after, str(mutant.number))
        for name in self.programs_of(mutant.file):
            differs, seconds = self._census[name, sanitizer]
            if self.numbers[mutant] not in differs:
                continue
            failed = self.log.get(name, self.hashes[name], *key)
            if failed is None:
                done = self._run(name, sanitizer, str(self.numbers[mutant]), 5 + int(3 * seconds))
                failed = done.returncode != 0
                self.log.put(failed, name, self.hashes[name], *key)
            if failed:
                return True
        return False

    @staticmethod
    def _run(name: str, sanitizer: str, mutant: str, seconds: int) -> subprocess.CompletedProcess[str]:
        def limits() -> None:
            # Processor time, not time: the machine may be busy, and a mutant that hangs does not wait.
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        env = {**os.environ, "FT_MUTANT": mutant, "FT_CASES_STOP": "1", "TSAN_OPTIONS": "halt_on_error=1"}
        program = ROOT / PROGRAMS.path(name, sanitizer)
        return subprocess.run(
            [program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=limits,
            env=env,
        )


def kernels() -> tuple[list[Path], list[str]]:
    """The files to mutate; and the names of those that no standalone case includes."""
    paths = [p for p in sorted([*KERNELS.glob("*.cuh"), KERNELS / "table.h"]) if p.name not in NOT_KERNELS]
    used = {file for name in build.names() for file in files_of(name)}
    tried = [path for path in paths if f"csrc/cuda/{path.name}" in used]
    return tried, [path.name for path in paths if path not in tried]


@cache
def files_of(program: str) -> list[str]:
    compiler, problem = build.find_compiler()
    if compiler is None:
        raise build.BuildFailed(problem)
    command = [*compiler.command, *build.FLAGS, "-MM", f"tests/simt/{program}.cpp"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(set(listed.replace("\\\n", " ").split()[1:]))


def judge(every: list[Mutant], mutants: list[Mutant], reasons: Reasons) -> dict[Mutant, str]:
    """What stopped each of `mutants`: a build's name, or SURVIVED. Those with a reason take longest: they come last."""
    bench = Bench(every)
    verdicts = dict.fromkeys(mutants, SURVIVED)
    for sanitizer in build.SANITIZERS:
        left = [m for m in mutants if verdicts[m] == SURVIVED and sanitizer in sanitizers_of(m)]
        left.sort(key=lambda m: m.key in reasons)
        bench.prepare(sanitizer, left)
        with progress_bar(len(left), f"mutants, {sanitizer}", None) as bar:
            running = {POOL.submit(bench.stops, m, sanitizer): m for m in left}
            for done in as_completed(running):
                if done.result():
                    verdicts[running[done]] = sanitizer
                bar.advance()
        print(
            f"{sanitizer}: {sum(v == sanitizer for v in verdicts.values())} of {len(left)} stopped",
            flush=True,
        )
    return verdicts


def equivalents() -> Reasons:
    """The reason why a mutant computes the same, by Mutant.key. An entry may have several `changes` of a file: the
    line, what it becomes, and, where there are several such lines, which of them, from 0."""
    table = tomllib.loads(EQUIVALENTS.read_text())
    return {
        (entry["file"], before, after, number[0] if number else 0): entry["reason"]
        for entry in table.get("mutants", [])
        for before, after, *number in entry["changes"]
    }


def summary(verdicts: dict[Mutant, str], reasons: Reasons) -> str:
    """The Markdown of mutants.md."""
    columns = [*build.SANITIZERS, "equivalent", "unexplained"]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for mutant, verdict in verdicts.items():
        if verdict == SURVIVED:
            verdict = "equivalent" if mutant.key in reasons else "unexplained"
        counts.setdefault((mutant.file, mutant.kind), Counter())[verdict] += 1
    lines = [
        "# Mutants of the kernels",
        "",
        "Written by `python -m tests.simt.mutate`. Each barrier, mask and bound of `csrc/cuda`, changed one at a time,",
        "is stopped by a standalone case: plain, else under AddressSanitizer and UBSan, else under ThreadSanitizer; or",
        "it computes the same, for the reason given.",
        "",
        "| file | change | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    total: Counter[str] = Counter()
    for (file, kind), counter in sorted(counts.items()):
        total += counter
        lines.append(f"| {file} | {kind} | " + " | ".join(str(counter[c] or "") for c in columns) + " |")
    lines.append("| **all** | | " + " | ".join(str(total[c]) for c in columns) + " |")
    unexplained = [m for m, v in verdicts.items() if v == SURVIVED and m.key not in reasons]
    if unexplained:
        lines += ["", "## Unexplained", "", *map(line_of, unexplained)]
    by_reason: dict[tuple[str, str], list[Mutant]] = {}
    for mutant, verdict in verdicts.items():
        if verdict == SURVIVED and mutant.key in reasons:
            by_reason.setdefault((mutant.file, reasons[mutant.key]), []).append(mutant)
    lines += ["", "## Equivalent"]
    for (_, reason), alike in by_reason.items():
        lines += ["", *map(line_of, alike), f"  <br>{reason}"]
    return "\n".join(lines) + "\n"


def line_of(mutant: Mutant) -> str:
    return f"- {mutant.file} ({mutant.kind}): `{mutant.before.strip()}` → `{mutant.after.strip()}`"


def main(files: list[str]) -> int:
    paths, untried = kernels()
    every = [m for path in paths for m in mutants_of(path)]
    reasons = equivalents()
    verdicts = judge(every, [m for m in every if not files or m.file in files], reasons)
    text = summary(verdicts, reasons)
    if untried:
        text += "\n## Not tried\n\nNo standalone case includes: " + ", ".join(untried) + ".\n"
    if files:
        print(text)
    else:
        SUMMARY.write_text(text)
    survivors = [m for m, v in verdicts.items() if v == SURVIVED]
    stale = set(reasons) - {m.key for m in survivors}
    for key in sorted(stale) if not files else []:
        print("equivalents.toml: no such survivor:", *key, sep="\n  ")
    unexplained = [m for m in survivors if m.key not in reasons]
    for m in unexplained:
        print(f"survived: {m.file}:{m.line + 1} {m.before.strip()} -> {m.after.strip()}")
    if untried:
        print("no standalone case includes", *untried)
    return int(bool(unexplained or untried) or (bool(stale) and not files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
