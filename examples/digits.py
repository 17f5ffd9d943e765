"""scikit-learn's bundled handwritten digits (1,797 real 8x8 images, no download) as torch tensors.

Every example splits them alike: a permutation drawn from the seed, then 900 images of the *source* task, a *pool*
of 400 to adapt with or to choose hyperparameters by, and 497 to test on, once per method. The *target domain* is the
same digits through a bad camera: rotated by 15 degrees and noisy.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SOURCE, POOL = 900, 400  # the remaining 497 are the test images
CLASSES = 10
DEGREES, NOISE = 15.0, 0.25


class Split(NamedTuple):
    """Images [N, 1, 8, 8] in [0, 1] and their labels [N]."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> Split:  # type: ignore[override]
        """The images that an index, a mask or a slice selects."""
        return Split(self.images[index], self.labels[index])

    def without(self, digit: int) -> Split:
        """The same images but for those of one digit."""
        return self[self.labels != digit]

    def only(self, *digits: int) -> Split:
        """The images of these digits."""
        return self[torch.isin(self.labels, torch.tensor(digits))]


class Digits(NamedTuple):
    """The three disjoint parts of one seed's permutation."""

    source: Split
    pool: Split
    test: Split


@cache
def all_digits() -> Split:
    """All 1,797 images in scikit-learn's order."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return Split(images, torch.tensor(bunch.target, dtype=torch.int64))


def split(seed: int) -> Digits:
    """900 / 400 / 497 images by a permutation drawn from `seed`."""
    order = torch.randperm(SOURCE + POOL + 497, generator=torch.Generator().manual_seed(seed))
    return Digits(*(all_digits()[part] for part in order.tensor_split([SOURCE, SOURCE + POOL])))


def in_target_domain(data: Split, seed: int) -> Split:
    """Rotated by 15 degrees, with Gaussian noise of standard deviation 0.25, cut to [0, 1]."""
    images = turned(data.images, DEGREES)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return Split((images + NOISE * noise).clamp(0, 1), data.labels)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images [N, 1, H, W] rotated about their centre, by bilinear interpolation."""
    angle = math.radians(degrees)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    ).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def few_labels(data: Split, per_class: int, seed: int, wrong: float = 0.0) -> Split:
    """`per_class` images of each class that occurs; a share `wrong` of them labelled as another class."""
    random = torch.Generator().manual_seed(seed)
    classes = data.labels.unique()
    picked = []
    for digit in classes:
        of_digit = (data.labels == digit).nonzero()[:, 0]
        picked.append(of_digit[torch.randperm(len(of_digit), generator=random)[:per_class]])
    chosen = data[torch.cat(picked)]
    mislabelled = torch.randperm(len(chosen.labels), generator=random)[: round(wrong * len(chosen.labels))]
    place = torch.searchsorted(classes, chosen.labels)
    place[mislabelled] += torch.randint(1, len(classes), mislabelled.shape, generator=random)
    return Split(chosen.images, classes[place % len(classes)])
