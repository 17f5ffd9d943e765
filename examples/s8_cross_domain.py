"""S8, transfer across domains: did it help, and what did it cost in the domain it came from?

Run it:  python -m examples.s8_cross_domain [--quick]

Source: handwritten digits as they are. Target: the same digits rotated by 15 degrees and noisy, five labels per
class, all of them right or 30% wrong. Every way to adapt is compared with training from scratch (did transfer
help?), with the source model as it is (did adapting?) and with plain fine-tuning (did the method?); and it is tested
in the source's domain too, which fine-tuning forgets. "Blend" moves the fine-tuned weights back towards their start.
Strengths, alpha and stopping are chosen by cross-validation on the fifty training images alone.

Then a split where there is less to carry over: from the digits 0-4 to the digits 5-9.

Control: blending with a network that is just as good in the source domain but did not start where this one did
(the same data, other initial weights). Weights can be averaged because of a common start, not in general
(Frankle et al. 2020; Wortsman et al. 2022).
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from examples.digits import Digits, Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_blending
from examples.s1_fine_tuning import PER_CLASS, fine_tune, new_head_first, new_head_only
from examples.s2_feature_extraction import features_of, linear_classifier
from examples.s4_l2sp import DECAYS, STRENGTHS, cross_validated, l2sp, weight_decay
from examples.seeds import mean_and_spread, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, new_cnn, pretrained_cnn, train
from fasttransfer import blend_, kfold_indices, sweep_alpha

WRONG = {"clean": 0.0, "wrong": 0.3}
ALPHAS = tuple(i / 10 for i in range(11))
HALFWAY = 0.5
SCRATCH_STEPS, SCRATCH_RATE = 300, 3e-3

SCRATCH, ZERO, FROZEN = "from scratch", "source model as it is", "frozen features"
TUNED, STOPPED, DECAYED = "fine-tune", "fine-tune, early stop", "weight decay by CV"
CHOSEN, BLENDED = "L2-SP by CV", "blend, alpha by CV"
RELATED, STRANGER = "blend halfway", "blend with another net"
HEAD_FIRST = "new head, then all"


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


def adapted(
    data: Digits, pretrained: nn.Module, stranger: nn.Module, wrong: float, seed: int
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
    found: dict[str, Any] = {name: adapted(data, pretrained, stranger, w, seed) for name, w in WRONG.items()}
    return found | {"classes": {"scores": new_classes(data, seed)}}


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against scratch and against plain fine-tuning."""
    by_seed = over_seeds(run_seed, seeds(quick), reporter)
    results: dict[str, Any] = {"alphas": ALPHAS}
    tables, failures = [], []
    for condition, wrong in WRONG.items():
        found = summary([seed[condition]["scores"] for seed in by_seed], "target", [SCRATCH, ZERO, TUNED])
        order = [SCRATCH, ZERO, FROZEN, TUNED, STOPPED, DECAYED, CHOSEN, BLENDED, RELATED, STRANGER]
        methods = {name: found[name] for name in order}
        curves = {
            name: [
                mean_and_spread([s[condition]["curves"][name][i] for s in by_seed])
                for i in range(len(ALPHAS))
            ]
            for name in by_seed[0][condition]["curves"]
        }
        results[condition] = {"methods": methods, "curves": curves}
        tables.append(
            comparison(
                f"{PER_CLASS} labels per class, {'all right' if not wrong else f'{wrong:.0%} wrong'}: test accuracy "
                f"in %, mean ± std over {len(by_seed)} seeds",
                methods,
                {"target": "target", "source": "source"},
                {SCRATCH: "vs scratch", ZERO: "vs as is", TUNED: "vs fine-tune"},
                notes={STRANGER: "[dim]control[/]"},
            )
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
        f"{points(wrong, CHOSEN, ZERO)}. From the digits 0-4 to 5-9: {points(classes, HEAD_FIRST, SCRATCH)}."
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
