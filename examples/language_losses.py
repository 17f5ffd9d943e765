"""The same distillation step by three losses, on a vocabulary where logits are what fills the memory.

`F.kl_div` + `F.cross_entropy` as they are written by hand, `kd_loss` of the same logits, and `linear_kd_loss` of hidden
states and heads: three students of one start on the same batches.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from examples.language_data import CONTEXT, llama, piece_sequences, texts
from examples.language_training import BATCH, batches, next_token, optimized
from examples.parts import Reporter
from fasttransfer import kd_loss, linear_kd_loss

NAIVE, WHOLE, FUSED = "F.kl_div + F.cross_entropy", "kd_loss", "linear_kd_loss"


def naive(student: nn.Module, teacher: nn.Module, x: Tensor, weight: float) -> Tensor:
    """As it is written by hand, on whole logits."""
    with torch.no_grad():
        q = F.softmax(teacher(x).logits.flatten(0, 1)[next_token(x).flatten() != -100], -1)
    labels = next_token(x).flatten()
    logits = student(x).logits.flatten(0, 1)[labels != -100]
    kl = F.kl_div(F.log_softmax(logits, -1), q, reduction="batchmean")
    return weight * F.cross_entropy(logits, labels[labels != -100]) + (1 - weight) * kl


def whole(student: nn.Module, teacher: nn.Module, x: Tensor, weight: float) -> Tensor:
    """`kd_loss` of the same logits."""
    with torch.no_grad():
        says = teacher(x).logits
    return kd_loss(student(x).logits, says, next_token(x), label_weight=weight)


def fused(student: nn.Module, teacher: nn.Module, x: Tensor, weight: float) -> Tensor:
    """`linear_kd_loss`: no logits."""
    with torch.no_grad():
        says = teacher.model(x).last_hidden_state
    hidden = student.model(x).last_hidden_state
    return linear_kd_loss(
        hidden, student.lm_head.weight, says, teacher.lm_head.weight, next_token(x), label_weight=weight
    )


LOSSES = {NAIVE: naive, WHOLE: whole, FUSED: fused}


def lockstep(size: dict[str, int], weight: float, reporter: Reporter) -> dict[str, Any]:
    """Three students of one start on the same batches: losses per step, time, memory, and one gradient in float64."""
    reporter.say("learning pieces")
    sequences, vocabulary = piece_sequences(texts().train[: size["piece_text"]], size["pieces"])
    teacher = llama(128, 2, vocabulary, 1).eval().requires_grad_(False)
    students = {name: llama(64, 2, vocabulary, 2) for name in LOSSES}
    steps = size["lockstep"]
    x = sequences[:BATCH]
    reporter.say("gradients in float64")
    exact = _gradient(naive, llama(64, 2, vocabulary, 2).double(), _copy_in_double(teacher), x, weight)
    found: dict[str, Any] = {"vocabulary": vocabulary, "rows": BATCH * CONTEXT, "losses": {}}
    for name, loss_of in LOSSES.items():
        found["losses"][name] = {
            "error": _relative(_gradient(loss_of, students[name], teacher, x, weight), exact),
            "peak": peak_bytes(lambda s=students[name], f=loss_of: f(s, teacher, x, weight).backward()),
            "curve": [],
        }
        students[name].zero_grad()
    step = {name: optimized(student, steps) for name, student in students.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    reporter.say("three losses in lockstep")
    for rows in batches(len(sequences), steps, 3):
        for name, loss_of in LOSSES.items():
            began = time.perf_counter()
            loss = loss_of(students[name], teacher, sequences[rows], weight)
            step[name](loss)
            seconds[name].append(time.perf_counter() - began)
            found["losses"][name]["curve"].append(loss.item())
    for name, times in seconds.items():
        mine = found["losses"][name]
        mine["ms"] = 1e3 * statistics.median(times)
        mine["off"] = max(
            abs(a - b) / abs(b) for a, b in zip(mine["curve"], found["losses"][NAIVE]["curve"], strict=True)
        )
    return found


def _copy_in_double(teacher: nn.Module) -> nn.Module:
    other = type(teacher)(teacher.config).double().eval().requires_grad_(False)
    other.load_state_dict(teacher.state_dict())
    return other


def _gradient(loss_of: Any, student: nn.Module, teacher: nn.Module, x: Tensor, weight: float) -> Tensor:
    student.zero_grad()
    loss_of(student, teacher, x, weight).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])  # type: ignore[union-attr]


def _relative(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient.double() - exact).norm() / exact.norm())
