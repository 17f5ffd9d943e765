"""S3, model distillation: a student that never saw a 3.

Run it:  python -m examples.s3_distillation [--quick]

A CNN is trained on handwritten digits. A small student, another architecture, then learns from the teacher's
soft outputs on images from which every 3 has been removed, and is tested on all ten digits. Whatever it knows
about 3s, it knows from how the teacher says "not quite a 3" about other digits: at a higher temperature these
small probabilities carry weight (Hinton, Vinyals & Dean 2015, section 3).

Two controls: a student trained on the labels of the same images, and a student distilled from a teacher that
never saw a 3 either. Both should be lost on 3s, or the mechanism is not what is claimed.

The only thing chosen is each method's learning rate, per seed, by accuracy on validation images without 3s:
nobody shows the student a 3 until the test, which every method touches once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from examples.digits import CLASSES, Digits, Split, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_distillation
from examples.seeds import mean_and_spread, paired
from fasttransfer import kd_loss

MISSING = 3
TEMPERATURES = (1.0, 4.0, 8.0)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STUDENT_STEPS = 300  # whole transfer set at every step
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 200, 128, 3e-3
SEEDS = {"full": 8, "quick": 3}

HARD, TEACHER, BLIND = "hard labels", "teacher", "T=4, blind teacher"


def distilled_at(temperature: float) -> str:
    """The name of a method in tables and results."""
    return f"T={temperature:g}"


def teacher_model() -> nn.Module:
    """A CNN: 31,000 parameters, two convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def student_model() -> nn.Module:
    """A perceptron: 9,600 parameters, one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def train_teacher(data: Split, seed: int) -> nn.Module:
    """The usual training on labels, in batches."""
    torch.manual_seed(seed)
    teacher = teacher_model()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=TEACHER_RATE)
    for _ in range(TEACHER_STEPS):
        batch = torch.randint(len(data.labels), (TEACHER_BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
    return teacher


def train_student(loss_of: Callable[[nn.Module], Tensor], learning_rate: float, seed: int) -> nn.Module:
    """A student from the same initial weights for every method of a seed."""
    torch.manual_seed(1000 + seed)
    student = student_model()
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    for _ in range(STUDENT_STEPS):
        optimizer.zero_grad()
        loss_of(student).backward()
        optimizer.step()
    return student


def distil(transfer: Split, teacher_logits: Tensor, temperature: float) -> Callable[[nn.Module], Tensor]:
    """The distillation step: the teacher's logits are computed once, the loss is one call."""

    def loss(student: nn.Module) -> Tensor:
        return kd_loss(student(transfer.images), teacher_logits, temperature=temperature)

    return loss


def learn_labels(transfer: Split) -> Callable[[nn.Module], Tensor]:
    """The control: the same images with their labels."""

    def loss(student: nn.Module) -> Tensor:
        return F.cross_entropy(student(transfer.images), transfer.labels)

    return loss


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, 10]."""
    return model(images)


def accuracy(model: nn.Module, data: Split) -> float:
    """The share of images that are classified right."""
    return (logits_of(model, data.images).argmax(-1) == data.labels).double().mean().item()


def best_student(
    loss_of: Callable[[nn.Module], Tensor], validation: Split, seed: int
) -> tuple[nn.Module, float]:
    """The student of the learning rate that does best on validation images, and that rate."""
    students = {rate: train_student(loss_of, rate, seed) for rate in LEARNING_RATES}
    best = max(students, key=lambda rate: accuracy(students[rate], validation))
    return students[best], best


def run_seed(data: Digits, seed: int, reporter: Reporter) -> dict[str, dict[str, float]]:
    """Every method on one split: accuracy on the missing digit, on the others, and overall."""
    transfer, validation = data.source.without(MISSING), data.pool.without(MISSING)
    reporter.say(f"seed {seed}: teachers")
    teacher, blind = train_teacher(data.source, seed), train_teacher(transfer, seed)
    teacher_logits, blind_logits = logits_of(teacher, transfer.images), logits_of(blind, transfer.images)
    methods = {HARD: learn_labels(transfer)}
    methods |= {distilled_at(t): distil(transfer, teacher_logits, t) for t in TEMPERATURES}
    methods[BLIND] = distil(transfer, blind_logits, 4.0)

    scores = {TEACHER: test_scores(teacher, data.test)}
    reporter.advance()
    for name, loss_of in methods.items():
        reporter.say(f"seed {seed}: {name}")
        student, rate = best_student(loss_of, validation, seed)
        scores[name] = test_scores(student, data.test) | {"learning_rate": rate}
        reporter.advance()
    return scores


def test_scores(model: nn.Module, test: Split) -> dict[str, float]:
    """The only place where test images are looked at."""
    return {
        "missing": accuracy(model, test.only(MISSING)),
        "others": accuracy(model, test.without(MISSING)),
        "overall": accuracy(model, test),
    }


def nearest_to_missing(data: Digits, seed: int) -> dict[str, Any]:
    """Of the transfer images the teacher is sure of, the one most like the missing digit, and what it says."""
    transfer = data.source.without(MISSING)
    logits = logits_of(train_teacher(data.source, seed), transfer.images)
    sure = logits.softmax(-1).gather(1, transfer.labels[:, None])[:, 0] > 0.99
    i = int((logits.softmax(-1)[:, MISSING] * sure).argmax())
    return {
        "image": transfer.images[i, 0].tolist(),
        "label": int(transfer.labels[i]),
        "probabilities": {distilled_at(t): (logits[i] / t).softmax(-1).tolist() for t in TEMPERATURES},
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small do not profit from a second thread, and lose much to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def units(quick: bool) -> int:
    """One per teacher and method of every seed."""
    return SEEDS["quick" if quick else "full"] * (3 + len(TEMPERATURES))


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; mean, spread and paired differences against hard labels."""
    seeds = range(SEEDS["quick" if quick else "full"])
    with one_thread():
        by_seed = [run_seed(split(seed), seed, reporter) for seed in seeds]
        example = nearest_to_missing(split(0), 0)
    methods: dict[str, Any] = {}
    for name in by_seed[0]:
        methods[name] = {key: mean_and_spread([s[name][key] for s in by_seed]) for key in by_seed[0][name]}
        control = [s[HARD]["missing"] for s in by_seed]
        methods[name]["against_hard_labels"] = paired([s[name]["missing"] for s in by_seed], control)
    results = {
        "missing_digit": MISSING,
        "seeds": list(seeds),
        "methods": methods,
        "what_the_teacher_says": example,
    }
    return Outcome([results_table(results)], results, failures(results))


def failures(results: dict[str, Any]) -> list[str]:
    """The two controls. How large the effect is, is reported and not asserted."""
    missing = {name: method["missing"]["mean"] for name, method in results["methods"].items()}
    wrong = []
    for control in (HARD, BLIND):
        if not missing[distilled_at(4.0)] > missing[control]:
            wrong.append(
                f"distillation at T=4 ({missing[distilled_at(4.0)]:.3f} on the missing digit) is not above "
                f"'{control}' ({missing[control]:.3f})"
            )
    return wrong


def results_table(results: dict[str, Any]) -> Table:
    """A line per method."""
    digit, seeds = results["missing_digit"], len(results["seeds"])
    grid = Table(
        title=f"A student that never saw a {digit}: test accuracy in %, mean ± std over {seeds} seeds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("trained on", no_wrap=True)
    for header in (f"digit {digit}", "others", "overall", f"gain on {digit}", "seeds won", "verdict"):
        grid.add_column(header, justify="right", no_wrap=True)
    for name, method in results["methods"].items():
        shown = [plus_minus(method[key]) for key in ("missing", "others", "overall")]
        gain = method["against_hard_labels"]
        shown[0] = f"[bold]{shown[0]}[/]"
        if name == TEACHER:
            shown += ["[dim]ceiling[/]", "", ""]
        elif name == HARD:
            shown += ["[dim]control[/]", "", ""]
        else:
            shown.append(f"{100 * gain['difference']:+.1f}")
            shown += [f"{gain['wins']} of {gain['of']}", in_words(gain)]
        grid.add_row(DESCRIPTIONS[name], *shown)
    return grid


def in_words(gain: dict[str, Any]) -> str:
    """Whether a method helped, by the seeds it won against labels."""
    if gain["wins"] == gain["of"]:
        return "[green]helps[/]"
    return "[yellow]varies[/]" if gain["wins"] else "[dim]no[/]"


def plus_minus(figure: dict[str, Any]) -> str:
    """`mean ± std` in percent."""
    return f"{100 * figure['mean']:.1f} ± {100 * figure['std']:4.1f}"


DESCRIPTIONS = {
    TEACHER: "(the teacher itself)",
    HARD: "labels",
    **{distilled_at(t): f"teacher at T = {t:g}" for t in TEMPERATURES},
    BLIND: "T = 4, never saw a 3 either",
}

PART = Part("distillation", "1  A student that never saw a 3", units, run, plot_distillation)


if __name__ == "__main__":
    sys.exit(run_alone(PART))
