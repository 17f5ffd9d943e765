"""fasttransfer: the arithmetic of knowledge transfer between PyTorch models, fast and correct.

``kd_loss`` distils, ``L2SP`` pulls fine-tuning towards its start, ``blend`` fuses weights. See the README.
"""

from fasttransfer import native as _native
from fasttransfer.kd import KDLoss, kd_loss
from fasttransfer.native import build_info, simd_level, use_backend

_native.load()

__all__ = [
    "KDLoss",
    "build_info",
    "kd_loss",
    "simd_level",
    "use_backend",
]
