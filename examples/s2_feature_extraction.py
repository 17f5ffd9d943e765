"""S2, feature extraction: a classifier on what a frozen network sees.

Run it:  python -m examples.s2_feature_extraction [--quick]

The layers of a CNN that was trained on handwritten digits are read out once for few labelled images of another
domain; a linear classifier is trained on each. Early layers know edges, late ones know the source's digits: which
of them carries over is an empirical question (Yosinski et al. 2014).

Controls: the pixels themselves, and the same layers of an untrained network.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.digits import CLASSES, Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.seeds import mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, new_cnn, pretrained_cnn, train
from fasttransfer import extract_features

PER_CLASS = 5
STEPS, RATE = 200, 3e-3
LAYERS = {"trunk.0": "first convolution", "trunk": "both convolutions", "neck": "the last features"}
PIXELS = "pixels (control)"


def features_of(model: nn.Module, data: Split, layer: str) -> Split:
    """The outputs of a layer, flattened, in the place of the images."""
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=128)
    features, labels = extract_features(
        model, loader, layer, transform=lambda x: x.flatten(1), progress=False
    )
    assert labels is not None
    return Split(features, labels)


def linear_classifier(features: Split, seed: int) -> nn.Module:
    """Logistic regression on features [N, D]."""
    torch.manual_seed(seed)
    return train(nn.Linear(features.images.shape[1], CLASSES), features, steps=STEPS, rate=RATE)


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy in the target domain, by what the classifier sees."""
    data = split(seed)
    shots = few_labels(in_target_domain(data.pool, 100 + seed), PER_CLASS, seed)
    test = in_target_domain(data.test, 200 + seed)
    networks = {"untrained": new_cnn(300 + seed), "trained": pretrained_cnn(data.source, seed)}

    pixels = Split(shots.images.flatten(1), shots.labels), Split(test.images.flatten(1), test.labels)
    seen = {PIXELS: pixels}
    for state, network in networks.items():
        for layer in LAYERS:
            seen[named(layer, state)] = features_of(network, shots, layer), features_of(network, test, layer)
    return {
        name: {"target": accuracy(linear_classifier(train_features, seed), test_features)}
        for name, (train_features, test_features) in seen.items()
    }


def named(layer: str, state: str) -> str:
    """A row of the table."""
    return f"{LAYERS[layer]}, {state}" + (" (control)" if state == "untrained" else "")


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every layer against the pixels, and against itself untrained."""
    methods = summary(over_seeds(run_seed, seeds(quick), reporter), "target", [PIXELS])
    table = comparison(
        f"A linear classifier on frozen features, {PER_CLASS} labels per class: test accuracy in %, mean ± std",
        methods,
        {"target": "target"},
        {PIXELS: "vs pixels"},
        first="features",
    )
    failures = []
    last, control = named("neck", "trained"), named("neck", "untrained")
    if not mean_of(methods, last, "target") > mean_of(methods, control, "target"):
        failures.append(f"'{last}' is not above '{control}': nothing was transferred")
    headline = f"The last features of the trained network against pixels: {points(methods, last, PIXELS)}."
    return Outcome(headline, [table], {"methods": methods}, failures)


PART = Part("feature_extraction", "S2  Frozen features", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
