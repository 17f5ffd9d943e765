"""LogME against the evidence itself, maximised by a general optimiser; LEEP against its sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import fasttransfer
from fasttransfer import leep, logme


def log_evidence(f, y, log_alpha, log_beta):
    """log N(y | 0, F F' / alpha + I / beta): what is left when the weights are integrated out."""
    n = len(y)
    covariance = f @ f.T / math.exp(log_alpha) + np.eye(n) / math.exp(log_beta)
    sign, log_det = np.linalg.slogdet(covariance)
    assert sign > 0
    return -0.5 * (y @ np.linalg.solve(covariance, y) + log_det + n * math.log(2 * math.pi))


def best_evidence(f, y):
    starts = [(a, b) for a in (-3.0, 0.0, 3.0) for b in (-1.0, 2.0)]
    # With more features than samples the best noise may be none at all.
    options = {"xatol": 1e-6, "fatol": 1e-12, "maxiter": 4000}
    found = [
        minimize(
            lambda v: -log_evidence(f, y, *v) / len(y),
            start,
            method="Nelder-Mead",
            bounds=[(-20, 20), (-20, 25)],
            options=options,
        )
        for start in starts
    ]
    return -min(f.fun for f in found)


@pytest.mark.parametrize("rows, columns", [(60, 5), (40, 40), (30, 70)])
def test_logme_is_the_largest_evidence(rows, columns):
    labels = torch.arange(rows) % 3
    features = torch.randn(rows, columns, dtype=torch.float64) + torch.nn.functional.one_hot(labels, columns)
    targets = [(labels == k).double().numpy() for k in range(3)]
    expected = np.mean([best_evidence(features.numpy(), y) for y in targets])
    assert logme(features, labels) == pytest.approx(expected, abs=1e-6)


def test_logme_of_a_regression():
    features = torch.randn(50, 6, dtype=torch.float64)
    targets = features[:, :2] @ torch.randn(2, 2, dtype=torch.float64) + 0.3 * torch.randn(50, 2)
    expected = np.mean([best_evidence(features.numpy(), y) for y in targets.T.numpy()])
    assert logme(features, targets) == pytest.approx(expected, abs=1e-6)
    assert logme(features, targets[:, 0]) == pytest.approx(
        best_evidence(features.numpy(), targets[:, 0].numpy()), abs=1e-6
    )


def test_logme_in_blocks_and_of_other_types(monkeypatch):
    features, labels = torch.randn(300, 4, 5), torch.randint(0, 4, (300,))
    whole = logme(features, labels)
    monkeypatch.setattr("fasttransfer.transferability._BLOCK", 64)
    assert logme(features, labels) == pytest.approx(whole, abs=1e-10)
    assert logme(features.reshape(300, 20), labels.int() * 7 - 3) == pytest.approx(whole, abs=1e-10)
    assert logme(features.bfloat16(), labels) == logme(features.bfloat16().double(), labels)


def test_logme_where_it_degenerates():
    labels = torch.arange(20) % 2
    silent = torch.zeros(20, 3)
    # No feature: y ~ N(0, 1/beta) with beta = n / ||y||^2.
    assert logme(silent, labels) == pytest.approx(-0.5 * (math.log(2 * math.pi * 0.5) + 1), abs=1e-12)
    twice = torch.randn(20, 3).repeat(1, 2)
    assert math.isfinite(logme(twice, labels))
    perfect = torch.nn.functional.one_hot(labels, 2).double()
    assert logme(perfect, labels) > 10
    assert math.isfinite(logme(torch.eye(20), labels))


def test_better_features_score_higher():
    labels = torch.arange(200) % 5
    signal = torch.nn.functional.one_hot(labels, 16).float()
    noise = torch.randn(200, 16)
    scores = [logme(noise + share * signal, labels) for share in (0.0, 1.0, 3.0)]
    assert scores == sorted(scores)
    probabilities = [(share * signal + noise).softmax(-1) for share in (0.0, 1.0, 3.0)]
    scores = [leep(p, labels) for p in probabilities]
    assert scores == sorted(scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_leep(dtype):
    theta = (2 * torch.randn(40, 6, dtype=torch.float64)).softmax(-1).to(dtype)
    theta[:, 2] = 0  # a class that the source never predicts
    theta = (theta.double() / theta.double().sum(1, keepdim=True)).to(dtype)
    labels = torch.randint(0, 3, (40,)) * 5
    exact, total = theta.double(), 0.0
    for i in range(40):
        inner = 0.0
        for z in range(6):
            p_z = exact[:, z].mean().item()
            p_yz = exact[labels == labels[i], z].sum().item() / 40
            inner += (p_yz / p_z if p_z else 0.0) * exact[i, z].item()
        total += math.log(inner) / 40
    assert leep(theta, labels) == pytest.approx(total, abs=1e-12)


WRONG = {
    "no tensor": (TypeError, "features must be a tensor", lambda: logme([1.0], torch.zeros(1).long())),
    "integers": (
        TypeError,
        "features must be float32",
        lambda: logme(torch.zeros(4, 2).long(), torch.zeros(4).long()),
    ),
    "rows": (
        ValueError,
        r"labels must be \[n\] for the n samples of features \[4, 2\], got \[3\]",
        lambda: logme(torch.zeros(4, 2), torch.zeros(3).long()),
    ),
    "one sample": (
        ValueError,
        "at least two samples",
        lambda: logme(torch.zeros(1, 2), torch.zeros(1).long()),
    ),
    "no features": (
        ValueError,
        "at least one feature",
        lambda: logme(torch.zeros(4, 0), torch.zeros(4).long()),
    ),
    "no targets": (
        ValueError,
        "at least one target",
        lambda: logme(torch.zeros(4, 2), torch.zeros(4, 0)),
    ),
    "NaN": (
        ValueError,
        "features must be finite",
        lambda: logme(torch.full((4, 2), math.nan), torch.zeros(4).long()),
    ),
    "NaN target": (
        ValueError,
        "labels must be finite",
        lambda: logme(torch.zeros(4, 2), torch.full((4,), math.nan)),
    ),
    "floating labels": (
        TypeError,
        "labels must be int64 or int32",
        lambda: leep(torch.full((4, 2), 0.5), torch.zeros(4)),
    ),
    "logits": (
        ValueError,
        r"of logits pass .softmax\(-1\)",
        lambda: leep(torch.randn(4, 3), torch.zeros(4).long()),
    ),
    "three dimensions": (
        ValueError,
        r"must be \[samples, classes\]",
        lambda: leep(torch.full((4, 2, 2), 0.5), torch.zeros(4).long()),
    ),
    "nothing": (
        ValueError,
        r"must be \[samples, classes\]",
        lambda: leep(torch.zeros(0, 3), torch.zeros(0).long()),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, message, call = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_it_is_public():
    assert {"logme", "leep"} <= set(fasttransfer.__all__)
