"""S4, fine-tuning with L2-SP: a pull towards the starting point, its strength and length by cross-validation.

Run it:  python -m examples.s4_l2sp [--quick]

A CNN trained on handwritten digits is fine-tuned for another camera with five labels per class, 30% of them wrong.
The penalty lambda ||p - p0||^2 (Li et al. 2018) lets the few labels move the weights only as far as they are worth.
Lambda, and after how many rounds to stop, are chosen by five-fold cross-validation on these fifty images alone.

The row that isolates the penalty is "L2-SP, never stopped early": the same number of steps as plain fine-tuning, and
no difference but the pull (of the strength that was chosen). Control: the pull goes to an untrained network, which
knows nothing worth keeping.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from examples.digits import Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.s1_fine_tuning import PER_CLASS, RATE, STEPS, fine_tune
from examples.seeds import mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, new_cnn, pretrained_cnn
from fasttransfer import EMA, L2SP, kfold_search

ROUND = 10  # steps between two looks at the validation fold
STRENGTHS = (1000.0, 100.0, 10.0)  # lambda; the strongest first, which wins a tie
DECAYS = (10.0, 1.0, 0.1)  # AdamW's weight_decay
WRONG = 0.3

TUNED, STOPPED, DECAYED = "fine-tune", "fine-tune, stopped early", "weight decay by CV"
CHOSEN, WHOLE, UNTRAINED = "L2-SP by CV", "L2-SP, never stopped early", "L2-SP to an untrained network"

Rounds = Callable[[nn.Module, Split, float], Iterator[nn.Module]]


def l2sp(
    model: nn.Module,
    data: Split,
    strength: float,
    *,
    start: nn.Module | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
    by: str = "prox",
) -> Iterator[nn.Module]:
    """Fine-tuning pulled towards where it starts; the model after each round."""
    pull = L2SP(model, strength, start=start, importance=importance)
    optimizer = adamw(model)
    pull.attach(optimizer, by=by)  # "prox": after the step, since Adam would rescale a gradient
    while True:
        for _ in range(ROUND):
            step(model, data, optimizer)
        yield model


def averaged(model: nn.Module, data: Split, decay: float) -> Iterator[nn.Module]:
    """Fine-tuning, and the moving average of its weights after each round."""
    ema, optimizer, average = EMA(model, decay), adamw(model), copy.deepcopy(model)
    while True:
        for _ in range(ROUND):
            step(model, data, optimizer)
            ema.update(model)
        ema.copy_to(average)
        yield average


def weight_decay(model: nn.Module, data: Split, decay: float) -> Iterator[nn.Module]:
    """Fine-tuning pulled towards zero."""
    optimizer = adamw(model, decay)
    while True:
        for _ in range(ROUND):
            step(model, data, optimizer)
        yield model


def adamw(model: nn.Module, decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW; its own decay, which pulls towards zero, is off unless asked for."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=decay, fused=True)


def step(model: nn.Module, data: Split, optimizer: torch.optim.Optimizer) -> None:
    """One step on all of the labels."""
    optimizer.zero_grad()
    F.cross_entropy(model(data.images), data.labels).backward()
    optimizer.step()


def cross_validated(
    rounds: Rounds, pretrained: nn.Module, data: Split, values: Sequence[float], seed: int
) -> tuple[nn.Module, float]:
    """The model of the best value, trained on all of `data` for the best number of rounds; and that value."""

    def fit(value: float, train: torch.Tensor, validation: torch.Tensor) -> Iterator[float]:
        models = rounds(copy.deepcopy(pretrained), data[train], value)
        for model in islice(models, STEPS // ROUND):
            yield accuracy(model, data[validation])

    found = kfold_search(fit, values, data.labels, folds=5, patience=3, seed=seed, progress=False)
    return after(found.rounds, rounds(copy.deepcopy(pretrained), data, found.best)), found.best


def after(count: int, models: Iterator[nn.Module]) -> nn.Module:
    """The model after so many rounds."""
    return next(islice(models, count - 1, None))


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy in the target domain and in the source's, by method."""
    data = split(seed)
    pretrained = pretrained_cnn(data.source, seed)
    shots = few_labels(in_target_domain(data.pool, 100 + seed), PER_CLASS, seed, WRONG)
    test = in_target_domain(data.test, 200 + seed)

    decayed, _ = cross_validated(weight_decay, pretrained, shots, DECAYS, seed)
    chosen, strength = cross_validated(l2sp, pretrained, shots, STRENGTHS, seed)
    whole = partial(after, STEPS // ROUND)
    models = {
        TUNED: fine_tune(pretrained, shots),
        STOPPED: cross_validated(l2sp, pretrained, shots, [0.0], seed)[0],
        DECAYED: decayed,
        CHOSEN: chosen,
        WHOLE: whole(l2sp(copy.deepcopy(pretrained), shots, strength)),
        UNTRAINED: whole(l2sp(copy.deepcopy(pretrained), shots, strength, start=new_cnn(300 + seed))),
    }
    scores = {
        name: {"target": accuracy(m, test), "source": accuracy(m, data.test)} for name, m in models.items()
    }
    scores[CHOSEN]["strength"] = strength
    return scores


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against plain fine-tuning."""
    methods = summary(over_seeds(run_seed, seeds(quick), reporter), "target", [TUNED])
    table = comparison(
        f"{PER_CLASS} labels per class, {WRONG:.0%} of them wrong: test accuracy in %, mean ± std",
        methods,
        {"target": "target", "source": "source"},
        {TUNED: "vs fine-tune"},
        notes={UNTRAINED: "[dim]control[/]"},
    )
    failures = []
    for control in (TUNED, UNTRAINED):
        if not mean_of(methods, WHOLE, "target") > mean_of(methods, control, "target"):
            failures.append(f"'{WHOLE}' is not above '{control}': the pull does nothing")
    headline = f"L2-SP against fine-tuning, with wrong labels: {points(methods, CHOSEN, TUNED)}."
    return Outcome(headline, [table], {"methods": methods, "strengths": STRENGTHS}, failures)


PART = Part("l2sp", "S4  L2-SP under wrong labels", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
