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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import CLASSES, Split, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_distillation
from examples.seeds import mean_of, over_seeds, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, pretrained_cnn
from fasttransfer import kd_loss

MISSING = 3
TEMPERATURES = (1.0, 4.0, 8.0)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STEPS = 300  # whole transfer set at every step

TEACHER, HARD = "(the teacher itself)", "labels"


def distilled_at(temperature: float) -> str:
    """The name of a method in tables and results."""
    return f"teacher at T = {temperature:g}"


BLIND = f"T = 4, never saw a {MISSING} either"


def new_student(seed: int) -> nn.Module:
    """A perceptron: 9,600 parameters, one hidden layer."""
    torch.manual_seed(1000 + seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def train_student(loss_of: Callable[[nn.Module], Tensor], learning_rate: float, seed: int) -> nn.Module:
    """A student from the same initial weights for every method of a seed."""
    student = new_student(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, fused=True)
    for _ in range(STEPS):
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


def best_student(
    loss_of: Callable[[nn.Module], Tensor], validation: Split, seed: int
) -> tuple[nn.Module, float]:
    """The student of the learning rate that does best on validation images, and that rate."""
    students = {rate: train_student(loss_of, rate, seed) for rate in LEARNING_RATES}
    best = max(students, key=lambda rate: accuracy(students[rate], validation))
    return students[best], best


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """Every method on one split: accuracy on the missing digit, on the others, and overall."""
    data = split(seed)
    transfer, validation = data.source.without(MISSING), data.pool.without(MISSING)
    teacher, blind = pretrained_cnn(data.source, seed), pretrained_cnn(transfer, seed)
    teacher_logits, blind_logits = logits_of(teacher, transfer.images), logits_of(blind, transfer.images)
    methods = {HARD: learn_labels(transfer)}
    methods |= {distilled_at(t): distil(transfer, teacher_logits, t) for t in TEMPERATURES}
    methods[BLIND] = distil(transfer, blind_logits, 4.0)

    scores = {TEACHER: test_scores(teacher, data.test)}
    for name, loss_of in methods.items():
        student, rate = best_student(loss_of, validation, seed)
        scores[name] = test_scores(student, data.test) | {"learning_rate": rate}
    return scores


def test_scores(model: nn.Module, test: Split) -> dict[str, float]:
    """The only place where test images are looked at."""
    return {
        "missing": accuracy(model, test.only(MISSING)),
        "others": accuracy(model, test.without(MISSING)),
        "overall": accuracy(model, test),
    }


def nearest_to_missing(seed: int) -> dict[str, Any]:
    """Of the transfer images the teacher is sure of, the one most like the missing digit, and what it says."""
    data = split(seed)
    transfer = data.source.without(MISSING)
    logits = logits_of(pretrained_cnn(data.source, seed), transfer.images)
    sure = logits.softmax(-1).gather(1, transfer.labels[:, None])[:, 0] > 0.99
    i = int((logits.softmax(-1)[:, MISSING] * sure).argmax())
    return {
        "image": transfer.images[i, 0].tolist(),
        "label": int(transfer.labels[i]),
        "probabilities": {f"T = {t:g}": (logits[i] / t).softmax(-1).tolist() for t in TEMPERATURES},
    }


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against hard labels."""
    methods = summary(over_seeds(run_seed, seeds(quick), reporter), "missing", [HARD])
    table = comparison(
        f"Test accuracy in % of a student that never saw a {MISSING}, mean ± std over {len(seeds(quick))} seeds",
        methods,
        {"missing": f"digit {MISSING}", "others": "others", "overall": "overall"},
        {HARD: "vs labels"},
        notes={TEACHER: "[dim]ceiling[/]", HARD: "[dim]control[/]"},
        first="trained on",
    )
    results = {
        "missing_digit": MISSING,
        "temperatures": {f"T = {t:g}": distilled_at(t) for t in TEMPERATURES},
        "controls": {"labels": HARD, "blind": BLIND},
        "methods": methods,
        "what_the_teacher_says": nearest_to_missing(0),
    }
    headline = (
        f"At T = 4 the student recognizes {mean_of(methods, distilled_at(4.0), 'missing'):.0%} of the digit that it "
        f"never saw; trained on labels, {mean_of(methods, HARD, 'missing'):.0%}."
    )
    return Outcome(headline, [table], results, failures(methods))


def failures(methods: dict[str, Any]) -> list[str]:
    """The two controls. How large the effect is, is reported and not asserted."""
    reached = mean_of(methods, distilled_at(4.0), "missing")
    return [
        f"distillation at T = 4 ({reached:.3f} on the missing digit) is not above '{control}' "
        f"({mean_of(methods, control, 'missing'):.3f})"
        for control in (HARD, BLIND)
        if not reached > mean_of(methods, control, "missing")
    ]


PART = Part(
    "distillation",
    "1  A student that never saw a 3",
    lambda quick: len(seeds(quick)),
    run,
    __doc__,
    plot_distillation,
)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
