"""Which rows of a batch count: the labels beside the logits, and a weight per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttransfer.kd_arguments import Options


class Rows(NamedTuple):
    """What the loss gets, in the leading dimensions of the logits."""

    labels: Tensor | None
    weight: Tensor | None  # of 0 and 1
    number: int  # all rows
    mask: Tensor | None  # which tokens are no padding

    def counted(self, options: Options) -> Tensor:
        """``[1]``, or ``[2]`` (rows, labelled rows) where ignored rows are distilled too: what ``num_items`` takes."""
        if self.labels is None:
            number = torch.tensor(self.number) if self.weight is None else self.weight.count_nonzero()
            return number[None]
        labelled = self.labels != options.ignore_index
        if not options.distill_ignored:
            return labelled.count_nonzero()[None]
        present = torch.ones_like(labelled) if self.weight is None else self.weight != 0
        return torch.stack([present.count_nonzero(), (present & labelled).count_nonzero()])

    def read(self, options: Options) -> Tensor | None:
        """Bool, whether a row is read; None: all are."""
        if self.labels is not None and not options.distill_ignored:
            return self.labels != options.ignore_index
        return None if self.weight is None else self.weight != 0


class Layout(NamedTuple):
    """How the logits of a model are beside its labels."""

    shift: bool  # row t predicts token t + 1: labels are shifted, logits never
    mask: str  # the name of the mask of those tokens


def rows_of(batch: Mapping[str, Any], layout: Layout, options: Options) -> Rows:
    """The rows of a batch as the collator made it.

    Rows with labels count by them. Without labels, or where ignored rows are distilled, padding is told by the
    attention mask.

    Args:
        batch: With ``labels`` or, already shifted, ``shift_labels``, or neither; perhaps a mask.
        layout: Of the model.
        options: Of the loss.
    """
    mask = batch.get(layout.mask)
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if labels is not None and layout.shift:
            labels = F.pad(labels, (0, 1), value=options.ignore_index)[..., 1:]
            if mask is not None and mask.shape == labels.shape:
                # Padded on the left, the last pad stands before a label: nothing is to be predicted from it.
                labels = labels.masked_fill(mask == 0, options.ignore_index)
    if labels is not None:
        padded = options.distill_ignored and mask is not None and mask.shape == labels.shape
        return Rows(labels, mask if padded else None, labels.numel(), mask)
    first = next((t for t in batch.values() if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise ValueError("a batch must have tensors for the model, got none")
    if not layout.shift:
        return Rows(None, None, len(first), mask)
    tokens = mask if mask is not None else batch.get("input_ids")
    if tokens is None:
        raise ValueError(f"a batch without labels must have {layout.mask} or input_ids: which rows count?")
    return Rows(None, mask, tokens.numel(), mask)
