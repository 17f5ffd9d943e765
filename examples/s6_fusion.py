"""S6, knowledge fusion across architectures: what a CNN knows, carried into a recurrent network.

Run it:  python -m examples.s6_fusion [--quick]

The source is a CNN trained on 900 clean digits. The target reads the rows of an image one after the other (a GRU),
and has 200 labelled images of another domain: rotated and noisy. A linear map T, fitted by least squares on these
images, carries the CNN's features into the space of the GRU's last state, and the two are fused,

    alpha * K_target + (1 - alpha) * T(K_source),

and read by the GRU's own head, which stays as it is: with the head fitted again, a random map would do as well, and
the experiment would show nothing. Alpha is chosen on 200 other images of the pool.

Control: a random map of the same scale. Its alpha is chosen alike, and should end at the target alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits import CLASSES, Split, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.plots import plot_fusion
from examples.s1_fine_tuning import fine_tune
from examples.seeds import mean_and_spread, mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, pretrained_cnn, right, train
from fasttransfer import LinearMap, blend, sweep_alpha

LABELLED = 200  # of the pool; the other 200 choose alpha
STEPS, RATE = 150, 3e-3
RIDGE = 10.0
ALPHAS = tuple(i / 10 for i in range(11))

GRU_ALONE, CNN_ALONE, TUNED = "GRU alone (alpha = 1)", "CNN alone", "CNN, fine-tuned on the same 200"
FUSED, MAPPED, RANDOM = "fused, fitted map", "mapped CNN (alpha = 0)", "fused, random map"


class RowReader(nn.Module):
    """A GRU over the eight rows of an image, and a head on its last state."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.gru = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def state(self, images: Tensor) -> Tensor:
        """The last state [N, width] of images [N, 1, 8, 8]."""
        return self.gru(images.squeeze(1))[1][0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.head(self.state(images))


def fitted_map(source: Tensor, target: Tensor) -> LinearMap:
    """The least-squares map from one network's features to the other's."""
    return LinearMap(source.shape[1], target.shape[1]).fit(source, target, ridge=RIDGE)


def random_map(source: Tensor, target: Tensor, seed: int) -> LinearMap:
    """The control: random directions, scaled so that what comes out has the target's mean and spread."""
    torch.manual_seed(seed)
    chance = LinearMap(source.shape[1], target.shape[1])
    nn.init.normal_(chance.weight)
    scale = target.std(0) / (source @ chance.weight.T).std(0)
    chance.weight.mul_(scale[:, None])
    chance.bias.copy_(target.mean(0) - chance.weight @ source.mean(0))
    return chance


@torch.no_grad()
def run_seed(seed: int) -> dict[str, Any]:
    """Test accuracy of every method, and of every alpha for the plot."""
    data = split(seed)
    pool, test = in_target_domain(data.pool, 100 + seed), in_target_domain(data.test, 200 + seed)
    labelled, validation = pool[:LABELLED], pool[LABELLED:]
    with torch.enable_grad():
        cnn = pretrained_cnn(data.source, seed)
        tuned = fine_tune(cnn, labelled)
        torch.manual_seed(500 + seed)
        gru = train(RowReader(), labelled, steps=STEPS, rate=RATE)

    def knowledge_of(part: Split) -> tuple[Tensor, Tensor]:
        return gru.state(part.images), cnn.neck(cnn.trunk(part.images))

    target, source = knowledge_of(labelled)
    maps = {FUSED: fitted_map(source, target), RANDOM: random_map(source, target, 600 + seed)}
    scores = {
        GRU_ALONE: {"target": accuracy(gru, test)},
        CNN_ALONE: {"target": accuracy(cnn, test)},
        TUNED: {"target": accuracy(tuned, test)},
    }
    curves = {}
    for name, transform in maps.items():
        target, source = knowledge_of(validation)
        found = sweep_alpha(
            target,
            source,
            ALPHAS,
            lambda fused: right(gru.head(fused), validation.labels),
            transform=transform,
        )
        target, source = knowledge_of(test)
        # The curve is for the plot; what counts is its one point that the validation images chose.
        curves[name] = [
            right(gru.head(blend(target, source, alpha, transform=transform)), test.labels)
            for alpha in ALPHAS
        ]
        scores[name] = {"target": curves[name][ALPHAS.index(found.best_alpha)], "alpha": found.best_alpha}
    scores[MAPPED] = {"target": curves[FUSED][0], "alpha": 0.0}
    return {"scores": scores, "curves": curves}


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against the GRU and against the CNN."""
    by_seed = over_seeds(run_seed, seeds(quick), reporter)
    methods = summary([seed["scores"] for seed in by_seed], "target", [GRU_ALONE, CNN_ALONE])
    order = [GRU_ALONE, CNN_ALONE, MAPPED, FUSED, RANDOM, TUNED]
    methods = {name: methods[name] for name in order}
    table = comparison(
        f"Into a GRU with {LABELLED} labels, its head kept: test accuracy in %, mean ± std over {len(by_seed)} seeds",
        methods,
        {"target": "target"},
        {GRU_ALONE: "vs the GRU", CNN_ALONE: "vs the CNN"},
        notes={RANDOM: "[dim]control[/]", TUNED: "[dim]for reference[/]"},
    )
    results = {
        "methods": methods,
        "alphas": ALPHAS,
        "curves": {
            name: [mean_and_spread([seed["curves"][name][i] for seed in by_seed]) for i in range(len(ALPHAS))]
            for name in by_seed[0]["curves"]
        },
        "lines": {"target": GRU_ALONE, "source": CNN_ALONE},
        "control": RANDOM,
    }
    failures = []
    if not mean_of(methods, FUSED, "target") > mean_of(methods, RANDOM, "target"):
        failures.append(f"'{FUSED}' is not above '{RANDOM}': the map carries no knowledge")
    # At alpha = 0 nothing but the map is left; two random ones would be at chance level, either above the other.
    if not all(seed["curves"][FUSED][0] > seed["curves"][RANDOM][0] for seed in by_seed):
        failures.append("at alpha = 0 the fitted map is not above the random one on every seed")
    headline = f"The CNN's knowledge fused into the GRU: {points(methods, FUSED, GRU_ALONE)}."
    return Outcome(headline, [table], results, failures)


PART = Part(
    "fusion", "3  A CNN's knowledge into a GRU", lambda quick: len(seeds(quick)), run, __doc__, plot_fusion
)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
