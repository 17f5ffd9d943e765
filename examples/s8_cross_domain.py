"""S8, transfer across domains: did it help, and what did it cost in the domain it came from?

Run it:  python -m examples.s8_cross_domain [--quick]

Source: handwritten digits as they are. Target: the same digits rotated by 15 degrees and noisy, five labels per
class, all of them right or 30% wrong. Every way to adapt is compared with training from scratch (did transfer
help?), with the source model as it is (did adapting?) and with plain fine-tuning (did the method?); and it is tested
in the source's domain too, which fine-tuning forgets. "Blend" moves the fine-tuned weights back towards their start.
Strengths, alpha and stopping are chosen by cross-validation on the fifty training images alone.

A second table compares each refinement with what it refines, everything else equal. L2-SP is a proximal step after each
step of AdamW; its control is the same penalty as a gradient, which AdamW rescales. Weighed by the Fisher information
of the source task (Kirkpatrick et al. 2017), it is compared with L2-SP without weights, and with the same weights
shuffled: then how much each matters is known, but not which. The moving average of the fine-tuned weights is compared
with these weights, stopped early likewise.

Then a split where there is less to carry over: from the digits 0-4 to the digits 5-9.

Control: blending with a network that is just as good in the source domain but did not start where this one did
(the same data, other initial weights). Weights can be averaged because of a common start, not in general
(Frankle et al. 2020; Wortsman et al. 2022).
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits import Digits, Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_blending
from examples.s1_fine_tuning import PER_CLASS, fine_tune, new_head_first, new_head_only
from examples.s2_feature_extraction import features_of, linear_classifier
from examples.s4_l2sp import DECAYS, STRENGTHS, averaged, cross_validated, l2sp, weight_decay
from examples.seeds import mean_and_spread, over_seeds, points, seeds, summary
from examples.tables import against_controls, comparison
from examples.training import accuracy, new_cnn, pretrained_cnn, train
from fasttransfer import blend_, fisher_importance, kfold_indices, sweep_alpha

WRONG = {"clean": 0.0, "wrong": 0.3}
ALPHAS = tuple(i / 10 for i in range(11))
HALFWAY = 0.5
GRADIENT_STRENGTHS = (100.0, 1.0, 0.01)  # AdamW takes the size out of a gradient: a wide grid
FISHER_STRENGTHS = (10000.0, 1000.0, 100.0)  # most weights' Fisher information is far below its mean, 1
EMA_DECAYS = (0.98, 0.9)
FISHER_SAMPLES = 300
SCRATCH_STEPS, SCRATCH_RATE = 300, 3e-3

SCRATCH, ZERO, FROZEN = "from scratch", "source model as it is", "frozen features"
TUNED, STOPPED, DECAYED = "fine-tune", "fine-tune, early stop", "weight decay by CV"
CHOSEN, BLENDED = "L2-SP by CV", "blend, alpha by CV"
RELATED, STRANGER = "blend halfway", "blend with another net"
HEAD_FIRST = "new head, then all"
GRADIENT, FISHER, SHUFFLED = "L2-SP as a gradient", "L2-SP by Fisher", "L2-SP by shuffled Fisher"
AVERAGED = "EMA of fine-tuning"
# Method, and what it is compared with. Every one chooses its strength or decay and its length by cross-validation.
REFINED = ((CHOSEN, GRADIENT), (FISHER, CHOSEN), (FISHER, SHUFFLED), (AVERAGED, STOPPED))


def blended(tuned: nn.Module, other: nn.Module, alpha: float) -> nn.Module:
    """A copy of the fine-tuned network, moved to another one: alpha = 1 leaves it where it is."""
    return blend_(copy.deepcopy(tuned), other, alpha)


def alpha_by_cross_validation(pretrained: nn.Module, data: Split, seed: int) -> float:
    """For each fold: fine-tune without it, and score every alpha on it. The best mean wins."""
    curves = []
    for train_rows, held_out in kfold_indices(data.labels, folds=5, seed=seed):
        fold, tuned = data[held_out], fine_tune(pretrained, data[train_rows])
        found = sweep_alpha(tuned, pretrained, ALPHAS, lambda m, fold=fold: accuracy(m, fold), progress=False)
        curves.append(found.scores)
    mean = torch.tensor(curves).mean(0)
    return ALPHAS[int(mean.argmax())]


def fisher_of(pretrained: nn.Module, source: Split) -> dict[str, Tensor]:
    """The Fisher information of the source task, scaled to a mean of 1."""
    found = fisher_importance(pretrained, [source.images], samples=FISHER_SAMPLES, progress=False)
    mean = torch.cat([f.flatten() for f in found.values()]).mean()
    return {name: f / mean for name, f in found.items()}


def shuffled(importance: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same values within each parameter, in other places."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: f.flatten()[torch.randperm(f.numel(), generator=drawn)].view_as(f)
        for name, f in importance.items()
    }


def refined(
    pretrained: nn.Module, importance: dict[str, Tensor], shots: Split, seed: int
) -> dict[str, nn.Module]:
    """The other forms of L2-SP, and the average; each with its value and its length by cross-validation."""

    def chosen(rounds: Any, values: Any) -> tuple[nn.Module, float]:
        return cross_validated(rounds, pretrained, shots, values, seed)

    by_fisher, strength = chosen(partial(l2sp, importance=importance), FISHER_STRENGTHS)
    mixed = partial(l2sp, importance=shuffled(importance, seed))
    return {
        GRADIENT: chosen(partial(l2sp, by="grad"), GRADIENT_STRENGTHS)[0],
        FISHER: by_fisher,
        SHUFFLED: chosen(mixed, [strength])[0],  # nothing differs but the places, and when to stop
        AVERAGED: chosen(averaged, EMA_DECAYS)[0],
    }


def adapted(
    data: Digits,
    pretrained: nn.Module,
    stranger: nn.Module,
    importance: dict[str, Tensor],
    wrong: float,
    seed: int,
) -> dict[str, Any]:
    """Every method in one condition: its test accuracies, and those along the two lines of blending."""
    shots = few_labels(in_target_domain(data.pool, 100 + seed), PER_CLASS, seed, wrong)
    tests = {"target": in_target_domain(data.test, 200 + seed), "source": data.test}
    tuned = fine_tune(pretrained, shots)
    alpha = alpha_by_cross_validation(pretrained, shots, seed)
    models = {
        SCRATCH: train(new_cnn(300 + seed), shots, steps=SCRATCH_STEPS, rate=SCRATCH_RATE),
        ZERO: pretrained,
        TUNED: tuned,
        STOPPED: cross_validated(l2sp, pretrained, shots, [0.0], seed)[0],
        DECAYED: cross_validated(weight_decay, pretrained, shots, DECAYS, seed)[0],
        CHOSEN: cross_validated(l2sp, pretrained, shots, STRENGTHS, seed)[0],
        BLENDED: blended(tuned, pretrained, alpha),
        RELATED: blended(tuned, pretrained, HALFWAY),
        STRANGER: blended(tuned, stranger, HALFWAY),
        **refined(pretrained, importance, shots, seed),
    }
    scores = {name: {at: accuracy(m, test) for at, test in tests.items()} for name, m in models.items()}
    scores[BLENDED]["alpha"] = alpha
    classifier = linear_classifier(features_of(pretrained, shots, "neck"), seed)
    scores[FROZEN] = {
        at: accuracy(classifier, features_of(pretrained, test, "neck")) for at, test in tests.items()
    }
    # The curves are for the plot; nothing is chosen by them.
    curves = {
        f"{name}, {at}": [accuracy(blended(tuned, other, alpha), test) for alpha in ALPHAS]
        for name, other in (("start", pretrained), ("another net", stranger))
        for at, test in tests.items()
    }
    return {"scores": scores, "curves": curves}


def new_classes(data: Digits, seed: int) -> dict[str, dict[str, float]]:
    """From the digits 0-4 to the digits 5-9, five labels of each."""
    pretrained = pretrained_cnn(data.source.only(0, 1, 2, 3, 4), seed)
    pool, test = (relabelled(part.only(5, 6, 7, 8, 9)) for part in (data.pool, data.test))
    shots = few_labels(pool, PER_CLASS, seed)
    models = {
        SCRATCH: train(new_cnn(300 + seed, 5), shots, steps=SCRATCH_STEPS, rate=SCRATCH_RATE),
        FROZEN: new_head_only(pretrained, shots, seed, 5),
        HEAD_FIRST: new_head_first(pretrained, shots, seed, 5),
    }
    return {name: {"target": accuracy(model, test)} for name, model in models.items()}


def relabelled(data: Split) -> Split:
    """The digits 5-9 as the classes 0-4."""
    return Split(data.images, data.labels - 5)


def run_seed(seed: int) -> dict[str, Any]:
    """Both conditions and the split by classes."""
    data = split(seed)
    pretrained, stranger = pretrained_cnn(data.source, seed), pretrained_cnn(data.source, 400 + seed)
    importance = fisher_of(pretrained, data.source)
    found: dict[str, Any] = {
        name: adapted(data, pretrained, stranger, importance, w, seed) for name, w in WRONG.items()
    }
    return found | {"classes": {"scores": new_classes(data, seed)}}


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against scratch and against plain fine-tuning."""
    by_seed = over_seeds(run_seed, seeds(quick), reporter)
    results: dict[str, Any] = {"alphas": ALPHAS}
    tables, failures = [], []
    for condition, wrong in WRONG.items():
        baselines = dict.fromkeys([SCRATCH, ZERO, TUNED, *(control for _, control in REFINED)])
        methods = summary([seed[condition]["scores"] for seed in by_seed], "target", list(baselines))
        order = [SCRATCH, ZERO, FROZEN, TUNED, STOPPED, DECAYED, CHOSEN, BLENDED, RELATED, STRANGER]
        curves = {
            name: [
                mean_and_spread([s[condition]["curves"][name][i] for s in by_seed])
                for i in range(len(ALPHAS))
            ]
            for name in by_seed[0][condition]["curves"]
        }
        results[condition] = {"methods": methods, "curves": curves}
        labels = "all right" if not wrong else f"{wrong:.0%} wrong"
        tables.append(
            comparison(
                f"{PER_CLASS} labels per class, {labels}: test accuracy in %, mean ± std over {len(by_seed)} seeds",
                {name: methods[name] for name in order},
                {"target": "target", "source": "source"},
                {SCRATCH: "vs scratch", ZERO: "vs as is", TUNED: "vs fine-tune"},
                notes={STRANGER: "[dim]control[/]"},
            )
        )
        tables.append(
            against_controls(f"Refinements, each against what it refines; labels {labels}", methods, REFINED)
        )
        related, control = methods[RELATED]["target"]["mean"], methods[STRANGER]["target"]["mean"]
        if not control < related:
            failures.append(
                f"{condition} labels: '{STRANGER}' ({control:.3f}) is not below '{RELATED}' ({related:.3f})"
            )
    results["classes"] = {"methods": summary([s["classes"]["scores"] for s in by_seed], "target", [SCRATCH])}
    tables.append(
        comparison(
            f"From the digits 0-4 to 5-9, {PER_CLASS} labels per class",
            results["classes"]["methods"],
            {"target": "target"},
            {SCRATCH: "vs scratch"},
        )
    )
    clean, wrong, classes = (results[name]["methods"] for name in ("clean", "wrong", "classes"))
    headline = (
        f"Fine-tuning against training from scratch: {points(clean, TUNED, SCRATCH)}. With 30% wrong labels, against "
        f"leaving the source model as it is: fine-tuning {points(wrong, TUNED, ZERO)}; L2-SP "
        f"{points(wrong, CHOSEN, ZERO)}; the average of the fine-tuned weights {points(wrong, AVERAGED, ZERO)}. From "
        f"the digits 0-4 to 5-9: {points(classes, HEAD_FIRST, SCRATCH)}."
    )
    return Outcome(headline, tables, results, failures)


PART = Part(
    "cross_domain",
    "2  Few labels in another domain",
    lambda quick: len(seeds(quick)),
    run,
    __doc__,
    plot_blending,
)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
