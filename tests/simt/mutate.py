"""Change each barrier, mask and bound of the kernels, one at a time: does a standalone case notice?

    python -m tests.simt.mutate                  # all; writes mutants.md, exit status 1 where one survives unexplained
    python -m tests.simt.mutate kd.cuh blend.cuh # of these files only; writes nothing

A mutant is compiled and run plain, then under AddressSanitizer, then under ThreadSanitizer (barriers at once), until
one build fails. Those that none can tell from the original, because there is no difference, are listed with the reason
in equivalents.toml. What was found out is kept in build/simt/mutants, so that a run can be continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tomllib

from fasttransfer.progress import progress_bar
from tests.simt import build
from tests.simt.mutations import NOT_KERNELS, Mutant, apply, mutants_of

ROOT = build.ROOT
KERNELS = ROOT / "csrc/cuda"
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build/simt/mutants"
SUMMARY = HERE / "mutants.md"
EQUIVALENTS = HERE / "equivalents.toml"
SECONDS = {"plain": 60, "asan": 180, "tsan": 240}  # of processor time: beyond, the mutant hangs
BUILDS = {
    "cluster_barrier": ("plain", "tsan"),
    "barrier": ("plain", "tsan"),
    "warp_barrier": ("plain", "tsan"),
}
SURVIVED = "survived"


class Bench:
    """Compiles a mutated copy of the sources against the machine's objects, which no mutant changes."""

    def __init__(self) -> None:
        self.compiler = build.find_compiler()[0].command
        self.programs = sorted(path.stem for path in HERE.glob("cases_*.cpp"))
        self.uses = {name: self._files_of(name) for name in self.programs}
        self.objects = {kind: self._machine(kind) for kind in build.SANITIZERS}
        self.known = json.loads(self._log.read_text()) if self._log.exists() else {}
        self._lock = threading.Lock()

    _log = WORK / "known.json"

    def _files_of(self, program: str) -> set[str]:
        command = [*self.compiler, *build.FLAGS, "-MM", f"tests/simt/{program}.cpp"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {word for word in listed.replace("\\\n", " ").split()[1:]}

    def _machine(self, kind: str) -> list[str]:
        folder = build.program("selftest", kind).parent
        return [str(folder / f"{Path(source).stem}.o") for source in build.MACHINE]

    def _hash(self, program: str, mutant: Mutant) -> str:
        h = hashlib.sha256(repr((mutant, build.FLAGS, build.SANITIZERS)).encode())
        for name in sorted(self.uses[program]):
            h.update((ROOT / name).read_bytes())
        return h.hexdigest()[:24]

    def programs_of(self, file: str) -> list[str]:
        """Those that use the file: cases_kd, which is every kernel at once and slow to compile, only where it must."""
        using = [p for p in self.programs if f"csrc/cuda/{file}" in self.uses[p]]
        return [p for p in using if p != "cases_kd"] or using

    def verdict(self, mutant: Mutant) -> str:
        """What stopped the mutant: a build's name, `compiler`, or SURVIVED."""
        programs = self.programs_of(mutant.file)
        key = "-".join(self._hash(p, mutant) for p in programs)
        if key not in self.known:
            found = self._run(mutant, programs)
            with self._lock:
                self.known[key] = found
                self._log.write_text(json.dumps(self.known, indent=0))
        return self.known[key]

    def _run(self, mutant: Mutant, programs: list[str]) -> str:
        folder = WORK / f"worker-{threading.get_ident()}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        mutated = folder / "csrc/cuda" / mutant.file
        mutated.write_text(apply(mutant, (KERNELS / mutant.file).read_text()))
        try:
            for kind in BUILDS.get(mutant.kind, ("plain", "asan", "tsan")):
                for program in programs:
                    if not self._compile(folder, program, kind):
                        return "compiler"
                    if not self._passes(folder / program, kind):
                        return kind
            return SURVIVED
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _compile(self, folder: Path, program: str, kind: str) -> bool:
        b = build.SANITIZERS[kind]
        includes = [f"-I{folder / 'csrc'}", f"-I{ROOT / 'tests'}"]
        flags = [f for f in build.FLAGS if not f.startswith("-I")]
        command = [*self.compiler, *flags, *includes, *b.both, *b.kernels, *build.contraction(), "-w", "-g0"]
        command += [str(HERE / f"{program}.cpp"), *self.objects[kind], "-o", str(folder / program)]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0

    @staticmethod
    def _passes(program: Path, kind: str) -> bool:
        def limits() -> None:
            # Processor time, not time: the machine may be busy, and a mutant that hangs does not wait.
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS[kind], SECONDS[kind]))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1"}
        return subprocess.run([program], capture_output=True, preexec_fn=limits, env=env).returncode == 0


def equivalents() -> dict[tuple[str, str, str], str]:
    """The reason why a mutant computes the same, by Mutant.key."""
    table = tomllib.loads(EQUIVALENTS.read_text())
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in table.get("mutant", [])}


def summary(verdicts: dict[Mutant, str], reasons: dict[tuple[str, str, str], str]) -> str:
    """The Markdown of mutants.md."""
    columns = ["plain", "asan", "tsan", "compiler", "equivalent", "unexplained"]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for mutant, verdict in verdicts.items():
        outcome = verdict
        if verdict == SURVIVED:
            outcome = "equivalent" if mutant.key in reasons else "unexplained"
        counts.setdefault((mutant.file, mutant.kind), Counter())[outcome] += 1
    lines = [
        "# Mutants of the kernels",
        "",
        "Written by `python -m tests.simt.mutate`. Each barrier, mask and bound of `csrc/cuda`, changed one at a time,",
        "is stopped by a standalone case: plain, under AddressSanitizer, under ThreadSanitizer (each tried after the",
        "one before), or by the compiler; or it computes the same, for the reason given.",
        "",
        "| file | change | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    total: Counter[str] = Counter()
    for (file, kind), counter in sorted(counts.items()):
        total += counter
        lines.append(f"| {file} | {kind} | " + " | ".join(str(counter[c] or "") for c in columns) + " |")
    lines.append("| **all** | | " + " | ".join(str(total[c]) for c in columns) + " |")
    for title, explained in (("Unexplained", False), ("Equivalent", True)):
        left = [m for m, v in verdicts.items() if v == SURVIVED and (m.key in reasons) == explained]
        if left:
            lines += ["", f"## {title}", ""]
        for m in left:
            where = f"- {m.file} ({m.kind}): `{m.before.strip()}` → `{m.after.strip()}`"
            lines.append(f"{where}<br>{reasons[m.key]}" if explained else where)
    return "\n".join(lines) + "\n"


def main(files: list[str]) -> int:
    paths = sorted([*KERNELS.glob("*.cuh"), KERNELS / "table.h"])
    paths = [p for p in paths if p.name not in NOT_KERNELS and p.exists() and (not files or p.name in files)]
    mutants = [m for path in paths for m in mutants_of(path)]
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    verdicts: dict[Mutant, str] = {}
    with progress_bar(len(mutants), "mutants", None) as bar, ThreadPoolExecutor(2) as pool:
        running = {pool.submit(bench.verdict, m): m for m in mutants}
        for done in as_completed(running):
            mutant = running[done]
            verdicts[mutant] = done.result()
            bar.advance()
            if not sys.stderr.isatty():
                print(len(verdicts), "of", len(mutants), verdicts[mutant], mutant.key, flush=True)
    verdicts = {m: verdicts[m] for m in mutants}
    reasons = equivalents()
    text = summary(verdicts, reasons)
    if files:
        print(text)
    else:
        SUMMARY.write_text(text)
    stale = set(reasons) - {m.key for m, v in verdicts.items() if v == SURVIVED}
    for key in sorted(stale) if not files else []:
        print("equivalents.toml: no such survivor:", *key, sep="\n  ")
    unexplained = [m for m, v in verdicts.items() if v == SURVIVED and m.key not in reasons]
    for m in unexplained:
        print(f"survived: {m.file}:{m.line + 1} {m.before.strip()} -> {m.after.strip()}")
    return int(bool(unexplained) or (bool(stale) and not files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
