"""S7, adaptive learning: how much of the source to keep, learned for each layer.

Run it:  python -m examples.s7_adaptive [--quick]

A CNN trained on handwritten digits is fine-tuned for another camera with five labels per class. The fine-tuned
weights are then blended with those that it started from, layer by layer,

    alpha_l * target_l + (1 - alpha_l) * source_l,    alpha_l = sigmoid(s_l),

and s follows the gradient of the mistakes on fifty other labelled images: the "learned soup" of Wortsman et al.
(2022, model soups), with an alpha per layer as in AdaMerging (Yang et al. 2024). The target task sets the strength of
the transfer: where all labels are right, and where 30% of them are wrong, in both fifties alike. So that wrong labels
do not decide, a mistake costs 1 - p(label) (Ghosh et al. 2017), which is also a smooth form of what `sweep_alpha`
counts.

The fifty held-out labels could have been trained on instead: that is the row "fine-tuned on both".

Control: the same with a network that was trained alike from other initial weights. Those cannot be averaged with
these (Frankle et al. 2020), so alpha should find its way to 1.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from examples.digits import Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.s1_fine_tuning import PER_CLASS, fine_tune
from examples.seeds import mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison, plus_minus
from examples.training import accuracy, pretrained_cnn
from fasttransfer import blend, blend_, sweep_alpha

WRONG = {"all right": 0.0, "30% wrong": 0.3}
LAYERS = ("trunk.0.*", "trunk.3.*", "neck.*", "head.*")  # name patterns of their weights and biases
ALPHAS = tuple(i / 10 for i in range(10, -1, -1))  # of equal ones the first wins: that nearest to the target
START = 2.0  # sigmoid(2) = 0.88: near the target, where two networks that cannot be averaged still work
STEPS, RATE = 100, 0.1

ZERO, TUNED, BOTH = "source as it is", "fine-tuned", "fine-tuned on both"
SWEPT, SINGLE, LAYERWISE = "one alpha, swept", "one alpha, learned", "alpha per layer"
STRANGER = "per layer, another net"


def learned_alphas(
    target: nn.Module, source: nn.Module, held_out: Split, layers: tuple[str, ...]
) -> dict[str, float]:
    """An alpha for each name pattern, by gradient on held-out images; neither network is modified."""
    strengths = {layer: torch.tensor(START, requires_grad=True) for layer in layers}
    optimizer = torch.optim.Adam(strengths.values(), lr=RATE)
    for _ in range(STEPS):
        weights = blend(target, source, {layer: s.sigmoid() for layer, s in strengths.items()})
        logits = functional_call(target, weights, (held_out.images,))
        optimizer.zero_grad()
        mistakes(logits, held_out.labels).backward(inputs=list(strengths.values()))
        optimizer.step()
    return {layer: s.sigmoid().item() for layer, s in strengths.items()}


def mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of 1 - p(label): bounded, so that a wrong label cannot outweigh the others."""
    return 1 - logits.softmax(-1).gather(1, labels[:, None]).mean()


def adapted(
    data: Split, test: Split, pretrained: nn.Module, stranger: nn.Module, wrong: float, seed: int
) -> dict[str, dict[str, float]]:
    """Test accuracy and mean alpha of every method, where this share of the labels is wrong."""
    half = len(data.labels) // 2
    shots = few_labels(data[:half], PER_CLASS, seed, wrong)
    held_out = few_labels(data[half:], PER_CLASS, 50 + seed, wrong)
    both = Split(*(torch.cat(parts) for parts in zip(shots, held_out, strict=True)))
    tuned = fine_tune(pretrained, shots)
    scores = {
        ZERO: {"target": accuracy(pretrained, test), "alpha": 0.0},
        TUNED: {"target": accuracy(tuned, test), "alpha": 1.0},
        BOTH: {"target": accuracy(fine_tune(pretrained, both), test)},
    }
    swept = sweep_alpha(
        tuned, pretrained, ALPHAS, lambda model: accuracy(model, held_out), progress=False
    ).best_alpha
    chosen = {
        SWEPT: (pretrained, {"*": swept}),
        SINGLE: (pretrained, learned_alphas(tuned, pretrained, held_out, ("*",))),
        LAYERWISE: (pretrained, learned_alphas(tuned, pretrained, held_out, LAYERS)),
        STRANGER: (stranger, learned_alphas(tuned, stranger, held_out, LAYERS)),
    }
    for name, (source, alphas) in chosen.items():
        model = blend_(copy.deepcopy(tuned), source, alphas)
        mean = sum(alphas.values()) / len(alphas)
        scores[name] = {"target": accuracy(model, test), "alpha": mean} | alphas
    return scores


def run_seed(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Every method where all labels are right, and where some are wrong."""
    data = split(seed)
    pretrained, stranger = pretrained_cnn(data.source, seed), pretrained_cnn(data.source, 400 + seed)
    pool, test = in_target_domain(data.pool, 100 + seed), in_target_domain(data.test, 200 + seed)
    return {
        condition: adapted(pool, test, pretrained, stranger, wrong, seed)
        for condition, wrong in WRONG.items()
    }


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against either end, and against the one alpha that was swept."""
    by_seed = over_seeds(run_seed, seeds(quick), reporter)
    results = {
        condition: {"methods": summary([seed[condition] for seed in by_seed], "target", [TUNED, ZERO, SWEPT])}
        for condition in WRONG
    }
    tables = [
        comparison(
            f"{PER_CLASS} + {PER_CLASS} labels per class, {condition}: test accuracy and mean alpha in %, "
            f"mean ± std over {len(by_seed)} seeds",
            found["methods"],
            {"target": "target", "alpha": "alpha"},
            {TUNED: "vs tuned", ZERO: "vs source", SWEPT: "vs swept"},
            notes={STRANGER: "[dim]control[/]", BOTH: "[dim]reference[/]"},
        )
        for condition, found in results.items()
    ]
    gained = points(results["30% wrong"]["methods"], LAYERWISE, ZERO)
    headline = f"A learned alpha per layer against the source as it is, with wrong labels: {gained}."
    return Outcome(headline, [*tables, layers(results)], results, failures(results))


def layers(results: dict[str, Any]) -> Table:
    """The learned alphas, layer by layer."""
    grid = Table(title="Learned alpha by layer in %, mean ± std", title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("labels, and blended with", no_wrap=True)
    for layer in LAYERS:
        grid.add_column(layer, justify="right", no_wrap=True)
    for condition, found in results.items():
        for name, source in ((LAYERWISE, "the start"), (STRANGER, "another net")):
            alphas = found["methods"][name]
            grid.add_row(f"{condition}, {source}", *(plus_minus(alphas[layer]) for layer in LAYERS))
    return grid


def failures(results: dict[str, Any]) -> list[str]:
    """What the source is worth must show in alpha, and under wrong labels in accuracy too."""
    found = []
    for condition in results:
        related, stranger = (
            mean_of(results[condition]["methods"], name, "alpha") for name in (LAYERWISE, STRANGER)
        )
        if not stranger > related:
            found.append(
                f"labels {condition}: the mean alpha of '{STRANGER}' ({stranger:.2f}) is not above that of "
                f"'{LAYERWISE}' ({related:.2f}): it does not adjust to the source"
            )
    methods = results["30% wrong"]["methods"]
    for control in (TUNED, STRANGER):
        if not mean_of(methods, LAYERWISE, "target") > mean_of(methods, control, "target"):
            found.append(f"labels 30% wrong: '{LAYERWISE}' is not above '{control}'")
    return found


PART = Part("adaptive", "S7  A learned alpha per layer", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
