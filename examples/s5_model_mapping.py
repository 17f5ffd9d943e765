"""S5, model mapping: is what two networks know the same, but for a linear map?

Run it:  python -m examples.s5_model_mapping [--quick]

Two CNNs learn the digits apart: from different images, other initial weights, and one has a quarter of the other's
parameters. Then the wide one loses its first layers, and is given what the narrow one sees instead,

    K_target = T(K_source),

where T is a convolution between their feature maps, or a linear map between their last features, fitted by least
squares on images that need no labels; what is left of the wide network stays as it is. Networks were first stitched
together so by Lenc & Vedaldi (2015); Bansal et al. (2021) ask which ones can be. The columns say how many images the
fit was given.

Controls: a random convolution whose channels have the right mean and spread, and the same fits out of a network that
was never trained. What those reach is due to the fit, and only what is above it to what the source has learned.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits import CLASSES, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.seeds import mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import CNN, SOURCE_BATCH, SOURCE_RATE, SOURCE_STEPS, accuracy, pretrained_cnn, train
from fasttransfer import ConvMap, LinearMap, extract_features

HALF = 450  # of the images to train on: the two networks have none in common
RIDGE = 1.0
FITTED_ON = {200: "on 200", 50: "on 50", 20: "on 20"}  # images of the pool; the headers of the table
MOST = FITTED_ON[200]

TARGET, SOURCE = "(the wide one itself)", "(the narrow one itself)"
SPATIAL, POINTWISE, LINEAR = "trunk, 3x3", "trunk, 1x1", "last features"
RANDOM, UNTRAINED = "trunk, random 3x3", " (untrained)"


class NarrowCNN(CNN):
    """10,000 parameters: half of the channels, half of the last features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
        )  # fmt: skip
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES)


def narrow_cnn(seed: int) -> NarrowCNN:
    """A narrow CNN whose initial weights are drawn from `seed`."""
    torch.manual_seed(seed)
    return NarrowCNN()


def outputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Feature maps [N, C, 4, 4] of the trunk, or features [N, D] of the neck."""
    return extract_features(model, images.split(128), layer, progress=False).features


def fitted_map(source: Tensor, target: Tensor, kernel_size: int) -> ConvMap:
    """The least-squares convolution from one network's feature maps to the other's."""
    return ConvMap(source.shape[1], target.shape[1], kernel_size).fit(source, target, ridge=RIDGE)


@torch.no_grad()
def random_map(source: Tensor, target: Tensor, kernel_size: int) -> ConvMap:
    """The control: random filters, scaled so that each channel that comes out has the target's mean and spread."""
    chance = ConvMap(source.shape[1], target.shape[1], kernel_size)
    nn.init.normal_(chance.weight)
    scale = target.std((0, 2, 3)) / chance(source).std((0, 2, 3))
    chance.weight.mul_(scale[:, None, None, None])
    chance.bias.add_((target - chance(source)).mean((0, 2, 3)))
    return chance


def stitched(source: CNN, target: CNN, images: Tensor) -> dict[str, nn.Module]:
    """The source up to some layer, a map that is fitted on these images, and the target from there on."""
    seen, wanted = outputs(source, "trunk", images), outputs(target, "trunk", images)
    last, last_wanted = outputs(source, "neck", images), outputs(target, "neck", images)
    linear = LinearMap(last.shape[1], last_wanted.shape[1]).fit(last, last_wanted, ridge=RIDGE)
    convolutions = {
        SPATIAL: fitted_map(seen, wanted, 3),
        POINTWISE: fitted_map(seen, wanted, 1),
        RANDOM: random_map(seen, wanted, 3),
    }
    models = {
        name: nn.Sequential(source.trunk, convolution, target.neck, target.head)
        for name, convolution in convolutions.items()
    }
    models[LINEAR] = nn.Sequential(source.trunk, source.neck, linear, target.head)
    return models


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy of every method, by the number of images that its map was fitted on."""
    data = split(seed)
    target = pretrained_cnn(data.source[:HALF], seed)
    source, untrained = narrow_cnn(700 + seed), narrow_cnn(800 + seed)
    train(source, data.source[HALF:], steps=SOURCE_STEPS, rate=SOURCE_RATE, batch=SOURCE_BATCH)

    scores = {TARGET: {MOST: accuracy(target, data.test)}, SOURCE: {MOST: accuracy(source, data.test)}}
    torch.manual_seed(900 + seed)  # of the random maps
    for count, column in FITTED_ON.items():
        images = data.pool.images[:count]
        models = stitched(source, target, images)
        without = stitched(untrained, target, images)
        models |= {name + UNTRAINED: without[name] for name in (SPATIAL, POINTWISE, LINEAR)}
        for name, model in models.items():
            scores.setdefault(name, {})[column] = accuracy(model, data.test)
    return scores


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every map against the random one, and against the network whose first layers it replaces."""
    found = summary(over_seeds(run_seed, seeds(quick), reporter), MOST, [RANDOM, TARGET])
    controls = [RANDOM, *(name + UNTRAINED for name in (POINTWISE, SPATIAL, LINEAR))]
    methods = {name: found[name] for name in (TARGET, SOURCE, POINTWISE, SPATIAL, LINEAR, *controls)}
    notes = {TARGET: "[dim]ceiling[/]", SOURCE: "[dim]reference[/]"}
    table = comparison(
        "A narrow CNN into a wide one, T fitted on 200, 50 or 20 images: test accuracy in %, mean ± std",
        methods,
        {column: column for column in FITTED_ON.values()},
        {RANDOM: "vs random", TARGET: "vs wide"},
        notes=notes | {name: "[dim]control[/]" for name in controls},
        first="stitched at",
    )
    headline = f"Through a fitted 3x3 convolution, against the wide network itself: {points(methods, SPATIAL, TARGET)}."
    return Outcome(headline, [table], {"methods": methods}, failures(methods))


def failures(methods: dict[str, Any]) -> list[str]:
    """A map that carries nothing could be above a random one by chance, but hardly every time."""
    found = []
    for column in FITTED_ON.values():
        fitted, chance = methods[SPATIAL][column]["values"], methods[RANDOM][column]["values"]
        if not all(a > b for a, b in zip(fitted, chance, strict=True)):
            found.append(
                f"'{SPATIAL}' {column} images is not above '{RANDOM}' on every seed: the fit does nothing"
            )
    if not mean_of(methods, SPATIAL, MOST) > mean_of(methods, SPATIAL + UNTRAINED, MOST):
        found.append(
            f"'{SPATIAL}' is not above '{SPATIAL + UNTRAINED}': what the source learned is not carried"
        )
    return found


PART = Part("model_mapping", "S5  Model mapping", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
