"""Which pretrained model to start from: scores of a source on a target task, without any fine-tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttransfer.checks import check_tensor, shape, values_visible

_LABELS = (torch.int64, torch.int32)
_STEPS, _TOLERANCE, _SMALLEST = 500, 1e-8, 1e-30
# Rows reduced at a time: the float64 copy of a block, not of all features, is what is held.
_BLOCK = 8192


def logme(features: Tensor, labels: Tensor) -> float:
    r"""LogME: the log evidence per sample of a Bayesian linear regression from a source's features to the labels.

    For each class k, ``y = [label == k]`` and ``y ~ N(F w, 1/beta)``, ``w ~ N(0, 1/alpha)``; the evidence
    ``p(y | F)`` with ``w`` integrated out is maximised over alpha and beta by their fixed point, from alpha = beta
    (where features say little there can be a higher maximum elsewhere: by 0.02 at most in 300 cases of 3 to 40
    samples)::

        gamma = sum_i beta s_i / (alpha + beta s_i)          s: squared singular values of F
        alpha <- gamma / ||m||^2,   beta <- (n - gamma) / ||F m - y||^2,   m: the posterior mean of w

    and the score is the mean over the classes that occur of ``log p(y | F) / n``. Higher is better; scores compare
    sources on the same samples and labels, nothing else. Features are taken as they are, without a bias, as in the
    paper. Sums are float64, in blocks of rows (a QR decomposition, ``O(n D^2)``).

    You, Liu, Wang, Long: "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021, eqs.
    2 to 4 and algorithm 1; the convergence is in "Ranking and Tuning Pre-trained Models", JMLR 2022.

    Args:
        features: ``[n, D]`` or, flattened, ``[n, ...]``, float32, bfloat16, float16 or float64: what
            ``extract_features`` gives. n is at least 2.
        labels: ``[n]`` class indices, int64 or int32; or floating targets ``[n]`` or ``[n, K]`` of a regression.

    Returns:
        The score. It grows without bound where a target is fitted without any residual.

    Raises:
        TypeError: Something that is no tensor, another dtype.
        ValueError: Shapes that do not match, fewer than two samples, NaN or infinity.

    Example:
        >>> scores = {name: logme(*extract_features(m, loader, layer="neck")) for name, m in sources.items()}
    """
    check_tensor("features", features)
    rows = _check_rows("features", features, labels)
    if rows < 2:
        raise ValueError(f"features must have at least two samples, got {shape(features)}")
    if labels.numel() == 0:
        raise ValueError(f"labels must have at least one target, got {shape(labels)}")
    flat = features.detach().reshape(rows, -1)
    if flat.shape[1] == 0:
        raise ValueError(f"features must have at least one feature, got {shape(features)}")
    targets = _targets(labels).to(flat.device)
    _check_finite("features", flat)
    _check_finite("labels", targets)
    squared, inside, outside = _reduced(flat, targets)
    return _evidence(rows, flat.shape[1], squared, inside, outside)


def leep(source_probabilities: Tensor, labels: Tensor) -> float:
    r"""LEEP: the log likelihood per sample of the target's labels, predicted through the source's own classes.

    With ``theta(x)`` the source's probabilities of its Z classes on the target's samples::

        P(y, z) = mean_i [y_i == y] theta(x_i)_z,    P(y | z) = P(y, z) / P(z)
        score = mean_i log sum_z P(y_i | z) theta(x_i)_z         (at most 0, higher is better)

    Nguyen, Hassner, Seeger, Archambeau: "LEEP: A New Measure to Evaluate Transferability of Learned
    Representations", ICML 2020, section 3.

    Args:
        source_probabilities: ``[n, Z]``, the softmax of the source's logits, float32, bfloat16, float16 or float64.
        labels: ``[n]`` class indices of the target, int64 or int32.

    Raises:
        TypeError: Something that is no tensor, another dtype.
        ValueError: Shapes that do not match, no samples, rows that are no probabilities (of logits: pass their
            ``softmax(-1)``).

    Example:
        >>> score = leep(source(images).softmax(-1), labels)
    """
    check_tensor("source_probabilities", source_probabilities)
    rows = _check_rows("source_probabilities", source_probabilities, labels, _LABELS)
    if source_probabilities.dim() != 2 or rows == 0 or source_probabilities.shape[1] == 0:
        raise ValueError(
            f"source_probabilities must be [samples, classes], got {shape(source_probabilities)}"
        )
    theta = source_probabilities.detach().double()
    # A softmax of fp16 or bf16 is this far from 1.
    loose = 1e-5 if source_probabilities.dtype in (torch.float32, torch.float64) else 0.02
    if values_visible(theta) and not bool(
        (theta >= 0).all() and ((theta.sum(1) - 1).abs() <= loose * math.sqrt(theta.shape[1])).all()
    ):
        raise ValueError(
            "source_probabilities must be at least 0 and sum to 1 in each row: of logits pass .softmax(-1)"
        )
    _, classes = labels.detach().to(theta.device).unique(return_inverse=True)
    joint = theta.new_zeros(int(classes.max()) + 1, theta.shape[1]).index_add_(0, classes, theta)
    mass = joint.sum(0)
    given_z = joint / torch.where(
        mass > 0, mass, 1.0
    )  # a class that the source never predicts predicts nothing
    return float((given_z[classes] * theta).sum(1).log().mean())


def _check_rows(name: str, values: Tensor, labels: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> int:
    kinds = dtypes or (*_LABELS, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_tensor("labels", labels, kinds, "int64 or int32" + ("" if dtypes else ", or floating targets"))
    most = 2 if labels.is_floating_point() else 1
    if values.dim() == 0 or not 1 <= labels.dim() <= most or labels.shape[0] != values.shape[0]:
        raise ValueError(
            f"labels must be [n]{' or [n, K]' if most == 2 else ''} for the n samples of {name} {shape(values)}, got "
            f"{shape(labels)}"
        )
    return values.shape[0]


def _targets(labels: Tensor) -> Tensor:
    """``[n, K]`` in float64: one column per class that occurs, or the regression's targets."""
    labels = labels.detach()
    if labels.is_floating_point():
        return labels.double().reshape(labels.shape[0], -1)
    classes, index = labels.unique(return_inverse=True)
    return torch.nn.functional.one_hot(index, len(classes)).double()


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _reduced(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the features' SVD ``U S V'``: ``s = S^2`` [r], ``(U' y)^2`` [r, K], and ``||y - U U' y||^2`` [K].

    ``[F | Y] = Q R``, block by block: R holds all of it, and keeps the residual of a near perfect fit, which a Gram
    matrix would lose.
    """
    features_of = features.shape[1]
    r = targets.new_zeros(0, features_of + targets.shape[1])
    for begin in range(0, len(features), _BLOCK):
        end = begin + _BLOCK
        block = torch.cat([features[begin:end].double(), targets[begin:end]], 1)
        r = torch.linalg.qr(torch.cat([r, block]), mode="r").R
    left, singular, _ = torch.linalg.svd(r[:, :features_of], full_matrices=False)
    y = r[:, features_of:]
    inside = left.mT @ y
    outside = (y - left @ inside).square().sum(0)
    # Directions without features carry no evidence; what rounding puts there is not one.
    kept = singular > singular.max() * max(r.shape) * torch.finfo(torch.float64).eps
    outside = outside + torch.where(kept[:, None], 0.0, inside.square()).sum(0)
    return singular[kept].square(), inside[kept].square(), outside


def _evidence(rows: int, features_of: int, s: Tensor, inside: Tensor, outside: Tensor) -> float:
    """The maximal log evidence per sample, of all targets at once, their mean."""
    # Where nothing is left of a target the ratio runs to 0, and at 0 there would be 0/0.
    least = _SMALLEST * (s.max() if len(s) else 1)
    s = s[:, None]
    ratio = torch.ones_like(outside)  # alpha / beta

    def at(ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shrunk = s / (ratio + s)
        gamma = shrunk.sum(0)
        weight = (inside * s / (ratio + s).square()).sum(0)
        residual = outside + (inside * (1 - shrunk).square()).sum(0)
        return gamma, weight, residual

    for _ in range(_STEPS):
        gamma, weight, residual = at(ratio)
        new = gamma * residual / ((rows - gamma) * weight)
        # A target that no feature sees has no weight: any ratio does.
        new = torch.where(weight > 0, new, ratio).clamp_min(least)
        done = (new - ratio).abs() <= _TOLERANCE * ratio
        ratio = new
        if bool(done.all()):
            break
    gamma, weight, residual = at(ratio)
    # beta at its maximum for this ratio: n / (||F m - y||^2 + ratio ||m||^2).
    beta = rows / (residual + ratio * weight)
    log_det = (ratio + s).log().sum(0) + (features_of - len(s)) * ratio.log()
    evidence = rows * (beta.log() - math.log(2 * math.pi) - 1) + features_of * ratio.log() - log_det
    return float((evidence / (2 * rows)).mean())
