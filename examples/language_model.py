"""A small language model, distilled: the loss from logits, from hidden states, and from a cached teacher.

Run it:  python -m examples.language_model [--quick] [--save FILE] [--plots DIR]

Byte-level Llamas from a transformers config, on the text of Python's standard library. The teacher (3 layers, 128
wide) is trained on all of the training files, the student (2 layers, 64 wide) on a small part of them: from the next
byte alone, from the teacher's distribution too (forward KL at T = 1 beside the labels; the labels' weight chosen on
validation files), and from a cache of the teacher's k most probable bytes with a bucket for the rest. Test files are
read at the end, once per student.

Then the same student with thousands of byte-pair pieces, where logits are what fills the memory: the naive
`F.kl_div` + `F.cross_entropy`, `kd_loss` of the same logits, and `linear_kd_loss` of hidden states and heads, in
lockstep on the same batches: the same curve, time per step, and the memory of a step.

Control: the teacher's rows in another order (a teacher that knows nothing of the text at hand).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from examples.language_data import BYTES, CONTEXT, byte_sequences, llama, texts
from examples.language_losses import FUSED, NAIVE, WHOLE, lockstep
from examples.language_training import batches, bits_per_byte, next_token, optimized, train
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_language_model
from examples.seeds import mean_and_spread, over_seeds
from fasttransfer import TeacherCache, TeacherCacheWriter, kd_loss, topk_kd_loss

WEIGHTS = (0.1, 0.5)  # of the labels, to choose from
KS = (8, 32)
LABELS, LIVE, SHUFFLED = "labels only", "distilled, live teacher", "distilled, shuffled teacher"
# Numbers of seeds, steps, sequences and pieces.
SIZES = {
    "full": {"seeds": 2, "teacher": 250, "student": 200, "trial": 60, "set": 1024, "held_out": 128, "lockstep": 12,
             "pieces": 16384, "piece_text": 400_000},
    "quick": {"seeds": 1, "teacher": 6, "student": 6, "trial": 2, "set": 48, "held_out": 8, "lockstep": 2,
              "pieces": 600, "piece_text": 60_000},
}  # fmt: skip


def cached(k: int) -> str:
    """The name of a row."""
    return f"cached teacher, k = {k}"


def from_labels(student: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The next byte."""
    return lambda x, rows: F.cross_entropy(student(x).logits.flatten(0, 1), next_token(x).flatten())


def from_teacher(
    student: nn.Module, teacher: nn.Module, weight: float, shuffled: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """The next byte and the teacher's distribution of it."""

    def loss(x: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            says = teacher(x).logits
        if shuffled:
            says = says.flatten(0, 1)[torch.randperm(x.numel())].view_as(says)
        return kd_loss(student(x).logits, says, next_token(x), label_weight=weight)

    return loss


def from_cache(student: nn.Module, cache: TeacherCache, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The same from what a cache has kept of the teacher."""

    def loss(x: Tensor, rows: Tensor) -> Tensor:
        values, indices = cache[(rows[:, None] * CONTEXT + torch.arange(CONTEXT)).flatten()]
        shape = (*x.shape, cache.k)
        return topk_kd_loss(
            student(x).logits, values.view(shape), indices.view(shape), next_token(x), label_weight=weight,
            teacher_form="log_probs", tail="bucket",
        )  # fmt: skip

    return loss


# ----------------------------------------------------------------------------------------------- bytes: the curves
def new_teacher(seed: int = 0) -> nn.Module:
    """3 layers, 128 wide."""
    return llama(128, 3, BYTES, seed)


def new_student(seed: int) -> nn.Module:
    """2 layers, 64 wide."""
    return llama(64, 2, BYTES, 100 + seed)


def prepare(folder: Path, size: dict[str, int], reporter: Reporter) -> dict[str, Any]:
    """Train the teacher, cache its outputs for the student's text, choose the labels' weight; all kept in a folder."""
    parts = texts()
    train_set, validation = byte_sequences(parts.train), byte_sequences(parts.validation)[: size["held_out"]]
    student_set = train_set[torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))][
        : size["set"]
    ]
    teacher = new_teacher()
    reporter.say("training the teacher")
    train(teacher, train_set, size["teacher"], 0, from_labels(teacher))
    teacher.eval().requires_grad_(False)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    torch.save(student_set, folder / "student_set.pt")
    reporter.say("caching its outputs")
    found: dict[str, Any] = {
        "teacher": {"validation": bits_per_byte(teacher, validation)},
        "text": {name: len(text.encode()) for name, text in parts._asdict().items()}
        | {"student": student_set.numel()},
        "cache": {},
    }
    for k in KS:
        began = time.perf_counter()
        with TeacherCacheWriter(folder / f"cache{k}", k=k, vocab_size=BYTES, progress=False) as writer:
            for x in student_set.split(32):
                with torch.no_grad():
                    writer.add(teacher(x).logits)
        size_on_disk = sum(file.stat().st_size for file in (folder / f"cache{k}").iterdir())
        found["cache"][str(k)] = {"bytes": size_on_disk, "seconds": time.perf_counter() - began}
    reporter.say("choosing the labels' weight")
    scores = {}
    for weight in WEIGHTS:
        student = new_student(99)
        train(student, student_set, size["trial"], 99, from_teacher(student, teacher, weight))
        scores[weight] = bits_per_byte(student, validation)
    found["weight"] = min(scores, key=scores.__getitem__)
    return found


def loaded(folder: Path) -> tuple[nn.Module, Tensor]:
    """The teacher and the student's text, in another process."""
    teacher = new_teacher()
    teacher.load_state_dict(torch.load(folder / "teacher.pt"))
    return teacher.eval().requires_grad_(False), torch.load(folder / "student_set.pt")


class Seed:
    """One seed of all students, for a process of its own."""

    def __init__(self, folder: Path, size: dict[str, int], weight: float) -> None:
        self.folder, self.size, self.weight = folder, size, weight

    def __call__(self, seed: int) -> dict[str, dict[str, Any]]:
        """Per student: validation bits per byte along the way, and those of the test files."""
        teacher, sequences = loaded(self.folder)
        parts = texts()
        validation, test = (
            byte_sequences(text)[: self.size["held_out"]] for text in (parts.validation, parts.test)
        )
        makes: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
            LABELS: from_labels,
            LIVE: lambda s: from_teacher(s, teacher, self.weight),
            SHUFFLED: lambda s: from_teacher(s, teacher, self.weight, shuffled=True),
        }
        for k in KS:
            cache = TeacherCache(self.folder / f"cache{k}")
            makes[cached(k)] = lambda s, cache=cache: from_cache(s, cache, self.weight)
        found = {}
        steps = self.size["student"]
        for name, make in makes.items():
            student, curve = new_student(seed), []

            def watch(step: int, student: nn.Module = student, curve: list[Any] = curve) -> None:
                if step % max(steps // 10, 1) == 0:
                    curve.append([step, bits_per_byte(student, validation[:64])])

            train(student, sequences, steps, seed, make(student), watch)
            found[name] = {"test": bits_per_byte(student, test), "curve": curve}
        return found


def step_times(folder: Path, weight: float, steps: int) -> dict[str, float]:
    """Milliseconds per training step, medians of steps in turn: labels only, a live teacher, a cache."""
    teacher, sequences = loaded(folder)
    students = {name: new_student(0) for name in (LABELS, LIVE, *map(cached, KS))}
    losses = {LABELS: from_labels(students[LABELS]), LIVE: from_teacher(students[LIVE], teacher, weight)}
    for k in KS:
        cache = TeacherCache(folder / f"cache{k}")
        losses[cached(k)] = from_cache(students[cached(k)], cache, weight)
    step = {name: optimized(student, steps) for name, student in students.items()}
    seconds: dict[str, list[float]] = {name: [] for name in students}
    for rows in batches(len(sequences), steps, 0):
        for name in students:
            began = time.perf_counter()
            step[name](losses[name](sequences[rows], rows))
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


# ---------------------------------------------------------------------------------------------------------- the part
def run(quick: bool, reporter: Reporter) -> Outcome:
    """All of it; what misbehaved."""
    size = SIZES["quick" if quick else "full"]
    # Models this small gain little from a second thread, and on a busy machine lose ten times to it.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = prepare(folder, size, reporter)
        reporter.advance()
        by_seed = over_seeds(Seed(folder, size, results["weight"]), range(size["seeds"]), reporter)
        reporter.say("time per step")
        results["ms"] = step_times(folder, results["weight"], max(size["lockstep"], 4))
    results["students"] = {
        name: {
            "test": mean_and_spread([seed[name]["test"] for seed in by_seed]),
            "curve": [
                [step, statistics.fmean(seed[name]["curve"][i][1] for seed in by_seed)]
                for i, (step, _) in enumerate(by_seed[0][name]["curve"])
            ],
        }
        for name in by_seed[0]
    }
    results["lockstep"] = lockstep(size, results["weight"], reporter)
    reporter.advance()
    return Outcome(headline(results), tables(results), results, failures(results, quick))


def failures(results: dict[str, Any], quick: bool) -> list[str]:
    """Wrong gradients, curves that part; and, of a whole run, a control that does as well as its method."""
    wrong = []
    for name, loss in results["lockstep"]["losses"].items():
        if not loss["error"] <= 1e-4:
            wrong.append(f"{name}: the gradient is off by {loss['error']:.1e} from float64")
        if not loss["off"] <= 1e-3:
            wrong.append(f"{name}: a loss is off by {loss['off']:.1e} from the naive one's")
    test = {name: of["test"]["mean"] for name, of in results["students"].items()}
    if not quick and not test[LIVE] < test[SHUFFLED]:
        wrong.append(f"'{LIVE}' ({test[LIVE]:.3f}) is not below '{SHUFFLED}' ({test[SHUFFLED]:.3f})")
    return wrong


def headline(results: dict[str, Any]) -> str:
    """What came out, in a sentence."""
    test = {name: of["test"]["mean"] for name, of in results["students"].items()}
    losses, ms = results["lockstep"]["losses"], results["ms"]
    return (
        f"Test bits per byte: {LABELS} {test[LABELS]:.3f}, live teacher {test[LIVE]:.3f}, cached k = {KS[-1]} "
        f"{test[cached(KS[-1])]:.3f} at {ms[cached(KS[-1])] / ms[LIVE]:.2f} of its time per step. linear_kd_loss: "
        f"{_mb(losses[FUSED])} MB where the naive loss takes {_mb(losses[NAIVE])} MB and kd_loss {_mb(losses[WHOLE])} "
        f"MB; losses within {losses[FUSED]['off']:.0e} of the naive ones over {len(losses[FUSED]['curve'])} steps."
    )


def _mb(loss: dict[str, Any]) -> str:
    return "?" if loss["peak"] is None else f"{loss['peak'] / 1e6:.0f}"


def student_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells: student, test bits per byte, ms per step, the cache's size."""
    rows = []
    for name, of in results["students"].items():
        ms = results["ms"].get(name)
        k = next((k for k in KS if cached(k) == name), None)
        disk = f"{results['cache'][str(k)]['bytes'] / 1e6:.1f} MB" if k else ""
        cells = [name, f"{of['test']['mean']:.3f} ± {of['test']['std']:.3f}", f"{ms:.0f}" if ms else "", disk]
        rows.append(cells)
    return rows


def loss_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells: loss, ms per step, MB, gradient error, largest difference of the curve."""
    return [
        [name, f"{of['ms']:.0f}", _mb(of), f"{of['error']:.1e}", f"{of['off']:.1e}"]
        for name, of in results["lockstep"]["losses"].items()
    ]


STUDENT_HEADERS = ["student", "test bits per byte", "ms per step", "cache on disk"]
LOSS_HEADERS = ["loss", "ms per step", "memory of a step, MB", "gradient error", "curve off by"]


def tables(results: dict[str, Any]) -> list[Any]:
    """For the terminal."""
    made = []
    pairs = [
        ("Bytes: students of one size, mean ± std over seeds", STUDENT_HEADERS, student_rows(results)),
        (f"{results['lockstep']['vocabulary']:,} pieces: one step by three losses", LOSS_HEADERS, loss_rows(results)),
    ]  # fmt: skip
    for title, headers, rows in pairs:
        grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, header in enumerate(headers):
            grid.add_column(header, justify="right" if i else "left")
        for row in rows:
            grid.add_row(*row)
        made.append(grid)
    return made


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/language_models.md."""
    lines = []
    for headers, rows in ((STUDENT_HEADERS, student_rows(results)), (LOSS_HEADERS, loss_rows(results))):
        lines += ["| " + " | ".join(headers) + " |", "|---" + "|---:" * (len(headers) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    text, weight = results["text"], results["weight"]
    lines.append(
        f"The teacher has {results['teacher']['validation']:.3f} bits per byte on the validation files. It saw "
        f"{text['train'] / 1e6:.1f} MB of text, the students {text['student'] / 1e6:.2f} MB of it; the labels' weight "
        f"is {weight}, chosen from {', '.join(map(str, WEIGHTS))} on the validation files. Second table: "
        f"{results['lockstep']['rows']} rows, {results['lockstep']['vocabulary']:,} columns."
    )
    return "\n".join(lines)


PART = Part(
    "language_model",
    "A small language model, distilled",
    lambda quick: SIZES["quick" if quick else "full"]["seeds"] + 2,
    run,
    __doc__,
    plot_language_model,
)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
