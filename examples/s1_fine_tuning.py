"""S1, fine-tuning: a pretrained backbone, a new head; first the head on a frozen backbone, then everything.

Run it:  python -m examples.s1_fine_tuning [--quick]

A CNN trained on handwritten digits is adapted to another camera (rotated, noisy images) with five labels per class.
Training a new head and the backbone at once lets the gradients of a random head change the features in the first
steps; training the head alone first does not (Kumar et al. 2022, "LP-FT"). Whether that pays here, the table says.

Control: the same two stages from an untrained backbone. If it does as well, nothing was transferred.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from examples.digits import CLASSES, Split, few_labels, in_target_domain, split
from examples.parts import Outcome, Part, Reporter, run_alone
from examples.seeds import mean_of, over_seeds, points, seeds, summary
from examples.tables import comparison
from examples.training import accuracy, new_cnn, pretrained_cnn, train
from fasttransfer import freeze, replace_head, thaw

PER_CLASS = 5
STEPS, RATE = 100, 1e-3
HEAD_STEPS, HEAD_RATE = 200, 3e-3  # a head alone bears larger steps

UNTRAINED = "head first, untrained backbone"
HEAD_ONLY, AT_ONCE, STAGED = "new head, frozen backbone", "new head, all at once", "new head first, then all"


def fine_tune(pretrained: nn.Module, data: Split) -> nn.Module:
    """The same classes in another domain: head and backbone go on from where they are."""
    return train(copy.deepcopy(pretrained), data, steps=STEPS, rate=RATE)


def new_head_first(pretrained: nn.Module, data: Split, seed: int, classes: int = CLASSES) -> nn.Module:
    """A new head on a frozen backbone, then both."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)  # of the head: the same one for every method
    new = replace_head(model, classes)
    freeze(model, exclude=new)
    train(model, data, steps=HEAD_STEPS, rate=HEAD_RATE)
    thaw(model)
    return train(model, data, steps=STEPS, rate=RATE)


def new_head_only(pretrained: nn.Module, data: Split, seed: int, classes: int = CLASSES) -> nn.Module:
    """The first of the two stages."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    freeze(model, exclude=replace_head(model, classes))
    return train(model, data, steps=HEAD_STEPS, rate=HEAD_RATE)


def new_head_at_once(pretrained: nn.Module, data: Split, seed: int, classes: int = CLASSES) -> nn.Module:
    """Both from the start, in as many steps as the two stages have."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    replace_head(model, classes)
    return train(model, data, steps=HEAD_STEPS + STEPS, rate=RATE)


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy in the target domain, by method."""
    data = split(seed)
    pretrained = pretrained_cnn(data.source, seed)
    shots = few_labels(in_target_domain(data.pool, 100 + seed), PER_CLASS, seed)
    test = in_target_domain(data.test, 200 + seed)
    models = {
        UNTRAINED: new_head_first(new_cnn(300 + seed), shots, seed),
        HEAD_ONLY: new_head_only(pretrained, shots, seed),
        AT_ONCE: new_head_at_once(pretrained, shots, seed),
        STAGED: new_head_first(pretrained, shots, seed),
    }
    return {name: {"target": accuracy(model, test)} for name, model in models.items()}


def run(quick: bool, reporter: Reporter) -> Outcome:
    """All seeds; every method against the untrained backbone."""
    methods = summary(over_seeds(run_seed, seeds(quick), reporter), "target", [UNTRAINED, AT_ONCE])
    table = comparison(
        f"A new head with {PER_CLASS} labels per class in another domain: test accuracy in %, mean ± std",
        methods,
        {"target": "target"},
        {UNTRAINED: "vs untrained", AT_ONCE: "vs all at once"},
        notes={UNTRAINED: "[dim]control[/]"},
    )
    failures = []
    if not mean_of(methods, STAGED, "target") > mean_of(methods, UNTRAINED, "target"):
        failures.append(f"'{STAGED}' is not above '{UNTRAINED}': nothing was transferred")
    headline = (
        f"Head first, then all: against an untrained backbone {points(methods, STAGED, UNTRAINED)}; against training "
        f"all at once {points(methods, STAGED, AT_ONCE)}."
    )
    return Outcome(headline, [table], {"methods": methods}, failures)


PART = Part("fine_tuning", "S1  Fine-tuning with a new head", lambda quick: len(seeds(quick)), run, __doc__)

if __name__ == "__main__":
    sys.exit(run_alone(PART))
