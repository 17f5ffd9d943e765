"""scikit-learn's bundled handwritten digits (1,797 real 8x8 images, no download) as torch tensors.

Every example splits them alike: a permutation drawn from the seed, then 900 images to train on (`source`),
400 to choose hyperparameters with or to adapt to (`pool`), and 497 to test on, once per method.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SOURCE, POOL = 900, 400  # the remaining 497 are the test images
CLASSES = 10


class Split(NamedTuple):
    """Images [N, 1, 8, 8] in [0, 1] and their labels [N]."""

    images: Tensor
    labels: Tensor

    def without(self, digit: int) -> Split:
        """The same images but for those of one digit."""
        kept = self.labels != digit
        return Split(self.images[kept], self.labels[kept])

    def only(self, digit: int) -> Split:
        """The images of one digit."""
        kept = self.labels == digit
        return Split(self.images[kept], self.labels[kept])


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
    images, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([SOURCE, SOURCE + POOL])
    return Digits(*(Split(images[part], labels[part]) for part in parts))
