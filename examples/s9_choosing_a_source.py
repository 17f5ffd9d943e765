"""S9, choosing a source: which of several pretrained networks should be fine-tuned? Scores without fine-tuning any.

Run it:  python -m examples.s9_choosing_a_source [--quick]

Seven CNNs, each trained on the digits as another camera sees them (as they are, tilted and noisy, rotated, mirrored,
inverted, lower half dark, pixels shuffled), and one that was never trained. For a target domain with five labels per
class, LogME (You et al. 2021; on the last features) and LEEP (Nguyen et al. 2020; on the source's predictions) rank
them; then all of them are fine-tuned, which shows the ranking that the scores should have found. The network of the
target's own domain is left out: nobody has it.

Controls: the accuracy of a linear probe by cross-validation on the same fifty labels, which is the obvious way to
choose, and an order drawn by lot.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.table import Table
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from examples.digits import Split, few_labels, in_target_domain, split, turned
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.s1_fine_tuning import PER_CLASS, fine_tune
from examples.s2_feature_extraction import features_of
from examples.seeds import mean_and_spread, over_seeds, seeds
from examples.tables import plus_minus
from examples.training import accuracy, new_cnn, pretrained_cnn
from fasttransfer import kfold_indices, leep, logme


def _of_images(change: Callable[[Tensor], Tensor]) -> Callable[[Split, int], Split]:
    return lambda data, seed: Split(change(data.images), data.labels)


def _lower_half_dark(images: Tensor) -> Tensor:
    return torch.cat([images[:, :, :4], torch.zeros_like(images[:, :, 4:])], 2)


def _shuffled(images: Tensor) -> Tensor:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return images.flatten(1)[:, order].reshape(images.shape)


# What a camera makes of a split, with the seed of its noise.
DOMAINS: dict[str, Callable[[Split, int], Split]] = {
    "as it is": lambda data, seed: data,
    "tilted, noisy": in_target_domain,
    "rotated 45°": _of_images(lambda x: turned(x, 45.0)),
    "mirrored": _of_images(lambda x: x.flip(-1)),
    "inverted": _of_images(lambda x: 1 - x),
    "half dark": _of_images(_lower_half_dark),
    "shuffled": _of_images(_shuffled),
}
UNTRAINED = "untrained"
TARGETS = ("tilted, noisy", "rotated 45°", "inverted", "half dark")
SCORES = ("LogME", "LEEP", "linear probe", "by lot")
LOT = SCORES[-1]
RELATED = TARGETS[0]  # where sources differ and the best of them helps


def probed(features: Tensor, labels: Tensor, seed: int) -> float:
    """The mean accuracy of a logistic regression on held-out folds."""
    folds = [(train.numpy(), held.numpy()) for train, held in kfold_indices(labels, folds=5, seed=seed)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(cross_val_score(probe, features.numpy(), labels.numpy(), cv=folds).mean())


def scored(model: nn.Module, shots: Split, seed: int, lot: float) -> dict[str, float]:
    """What each score says of a source."""
    with torch.no_grad():
        probabilities = model(shots.images).softmax(-1)
    features = features_of(model, shots, "neck").images
    return {
        "LogME": logme(features, shots.labels),
        "LEEP": leep(probabilities, shots.labels),
        "linear probe": probed(features, shots.labels, seed),
        LOT: lot,
    }


def run_seed(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Target, source: its scores and the test accuracy that fine-tuning it gives."""
    data = split(seed)
    sources: dict[str, nn.Module] = {
        name: pretrained_cnn(change(data.source, 500 + seed), seed) for name, change in DOMAINS.items()
    }
    sources[UNTRAINED] = new_cnn(300 + seed)
    lots = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for target in TARGETS:
        change = DOMAINS[target]
        shots = few_labels(change(data.pool, 100 + seed), PER_CLASS, seed)
        test = change(data.test, 200 + seed)
        found[target] = {
            name: scored(model, shots, seed, torch.rand((), generator=lots).item())
            | {"accuracy": accuracy(fine_tune(model, shots), test)}
            for name, model in sources.items()
            if name != target
        }
    return found


def judged(sources: dict[str, dict[str, float]], score: str) -> dict[str, float]:
    """Kendall's tau with the accuracies, and what is lost by taking the source of the best score."""
    accuracies = [of["accuracy"] for of in sources.values()]
    scores = [of[score] for of in sources.values()]
    tau = kendalltau(scores, accuracies).statistic
    return {"tau": float(tau), "lost": max(accuracies) - accuracies[scores.index(max(scores))]}


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds and targets; how well each score ranks the sources."""
    by_seed = over_seeds(run_seed, seeds(quick), reporter)
    results: dict[str, Any] = {"targets": {}, "sources": by_seed}
    for target in (*TARGETS, "all"):
        targets = TARGETS if target == "all" else (target,)
        results["targets"][target] = {
            score: {
                figure: mean_and_spread(
                    [statistics.fmean(judged(seed[t], score)[figure] for t in targets) for seed in by_seed]
                )
                for figure in ("tau", "lost")
            }
            for score in SCORES
        }
    overall, related = results["targets"]["all"], results["targets"][RELATED]
    failures = [
        f"'{score}' ranks the sources of '{RELATED}' no better than drawing lots would: tau {tau:.2f}"
        for score in SCORES[:2]
        if not (tau := related[score]["tau"]["mean"]) > 0
    ]
    said = ", ".join(f"{score} {overall[score]['tau']['mean']:.2f}" for score in SCORES)
    lost = ", ".join(f"{score} {100 * overall[score]['lost']['mean']:.1f}" for score in SCORES)
    headline = (
        f"Kendall's tau between score and accuracy after fine-tuning: {said}. Points lost to the best source by "
        f"taking the highest score: {lost}."
    )
    return Outcome(headline, [_ranking(results["targets"]), _accuracies(by_seed)], results, failures)


def _ranking(targets: dict[str, Any]) -> Table:
    grid = Table(
        title="Kendall's tau with the accuracy after fine-tuning (1: the same order); points lost by the choice",
        caption="mean ± std over seeds, 7 sources per target",
        caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    grid.add_column("target", no_wrap=True)
    for score in SCORES:
        grid.add_column(score, justify="right")
        grid.add_column("lost", justify="right")
    for target, scores in targets.items():
        cells = []
        for score in SCORES:
            tau = scores[score]["tau"]
            cells += [f"{tau['mean']:.2f} ± {tau['std']:.2f}", f"{100 * scores[score]['lost']['mean']:.1f}"]
        grid.add_row(f"[bold]{target}[/]" if target == "all" else target, *cells)
    return grid


def _accuracies(by_seed: list[dict[str, Any]]) -> Table:
    grid = Table(
        title="Test accuracy in % after fine-tuning, by source and target",
        caption="mean ± std over seeds",
        caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    grid.add_column("source", no_wrap=True)
    for target in TARGETS:
        grid.add_column(target, justify="right", no_wrap=True)
    for source in (*DOMAINS, UNTRAINED):
        grid.add_row(source, *_cells(by_seed, source))
    return grid


def _cells(by_seed: list[dict[str, Any]], source: str) -> list[str]:
    return [
        plus_minus(mean_and_spread([seed[target][source]["accuracy"] for seed in by_seed]))
        if source in by_seed[0][target]
        else "–"
        for target in TARGETS
    ]


def markdown(results: dict[str, Any]) -> str:
    """The two tables of docs/choosing.md."""
    lines = [
        "| target | " + " | ".join(f"{score}: tau | points lost" for score in SCORES) + " |",
        "|---|" + "---:|" * (2 * len(SCORES)),
    ]
    for target, scores in results["targets"].items():
        cells = []
        for score in SCORES:
            tau, lost = scores[score]["tau"], scores[score]["lost"]
            cells.append(f"{tau['mean']:.2f} ± {tau['std']:.2f} | {100 * lost['mean']:.1f}")
        lines.append(f"| {'**all**' if target == 'all' else target} | {' | '.join(cells)} |")
    lines += ["", "| source | " + " | ".join(TARGETS) + " |", "|---|" + "---:|" * len(TARGETS)]
    for source in (*DOMAINS, UNTRAINED):
        lines.append(f"| {source} | {' | '.join(_cells(results['sources'], source))} |")
    return "\n".join(lines)


PART = Part("choosing_a_source", "S9  Choosing a source", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
