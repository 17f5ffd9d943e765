"""Callbacks for Lightning: the pull to the start, an average of the weights, staged unfreezing.

For ``lightning.pytorch`` and ``pytorch_lightning`` alike. Extra ``lightning``: ``pip install fasttransfer[lightning]``.
"""

from fasttransfer.integrations.lightning.ema import EMACallback
from fasttransfer.integrations.lightning.l2sp import L2SPCallback
from fasttransfer.integrations.lightning.unfreezing import StagedUnfreezing

__all__ = ["EMACallback", "L2SPCallback", "StagedUnfreezing"]
