"""fasttransfer: the arithmetic of knowledge transfer between PyTorch models, fast and correct.

``kd_loss`` distils, ``L2SP`` pulls fine-tuning towards its start, ``blend`` fuses weights. See the README.
"""

from fasttransfer import native as _native
from fasttransfer.blend import blend, blend_, blend_many, blend_many_
from fasttransfer.decoupled_kd import DecoupledKDLoss, decoupled_kd_loss
from fasttransfer.ema import EMA
from fasttransfer.feature_kd import FeatureKDLoss, feature_kd_loss
from fasttransfer.features import Features, extract_features
from fasttransfer.fisher import fisher_importance
from fasttransfer.kd import KDLoss, kd_loss
from fasttransfer.kd_stats import KDStats
from fasttransfer.l2sp import l2sp_add_grad_, l2sp_penalty, l2sp_prox_
from fasttransfer.l2sp_module import L2SP
from fasttransfer.linear_kd import LinearKDLoss, linear_kd_loss
from fasttransfer.lora import lora_penalty
from fasttransfer.maps import ConvMap, LinearMap
from fasttransfer.modules import freeze, replace_head, thaw
from fasttransfer.native import build_info, simd_level, simd_levels, use_backend
from fasttransfer.search import AlphaSweep, KFoldSearch, kfold_indices, kfold_search, sweep_alpha
from fasttransfer.teacher_cache import TeacherCache, TeacherCacheWriter, top_k_log_probs
from fasttransfer.topk_kd import TopKKDLoss, topk_kd_loss
from fasttransfer.transferability import leep, logme
from fasttransfer.weight_maps import WeightMap

_native.load()

__version__ = _native.version()

__all__ = [
    "EMA",
    "L2SP",
    "AlphaSweep",
    "ConvMap",
    "DecoupledKDLoss",
    "FeatureKDLoss",
    "Features",
    "KDLoss",
    "KDStats",
    "KFoldSearch",
    "LinearKDLoss",
    "LinearMap",
    "TeacherCache",
    "TeacherCacheWriter",
    "TopKKDLoss",
    "WeightMap",
    "blend",
    "blend_",
    "blend_many",
    "blend_many_",
    "build_info",
    "decoupled_kd_loss",
    "extract_features",
    "feature_kd_loss",
    "fisher_importance",
    "freeze",
    "kd_loss",
    "kfold_indices",
    "kfold_search",
    "l2sp_add_grad_",
    "l2sp_penalty",
    "l2sp_prox_",
    "leep",
    "linear_kd_loss",
    "logme",
    "lora_penalty",
    "replace_head",
    "simd_level",
    "simd_levels",
    "sweep_alpha",
    "thaw",
    "top_k_log_probs",
    "topk_kd_loss",
    "use_backend",
]
