"""Distillation, the pull to the start and an average of the weights in ``transformers.Trainer``.

Extra ``transformers``: ``pip install fasttransfer[transformers]``.
"""

from fasttransfer.integrations.transformers.distillation import DistillationMixin, DistillationTrainer
from fasttransfer.integrations.transformers.ema import EMACallback
from fasttransfer.integrations.transformers.l2sp import L2SPCallback

__all__ = ["DistillationMixin", "DistillationTrainer", "EMACallback", "L2SPCallback"]
