"""What the ranks of tests/test_sharded.py do: every case, in one process per rank.

A case is called on all ranks at once, with what it needs of the group, and fails by raising. ``run`` writes down per
case what it raised. All ranks draw the same random numbers.
"""

from __future__ import annotations

import json
import math
import re
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fasttransfer import DecoupledKDLoss, KDLoss, checks, decoupled_kd_loss, kd_loss, use_backend
from fasttransfer.ops import kd as kd_ops
from tests import sharded_params_worker

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
V = 57
WIDTHS = {2: (40, 17), 4: (20, 0, 30, 7)}
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "tvd": {"divergence": "tvd"},
    "decoupled": {"target_weight": 1.5, "nontarget_weight": 4.0},
}
AROUND = {
    "plain": {},
    "standardize": {"standardize": True},
    "softcap": {"softcap": 5.0},
    "both": {"standardize": True, "softcap": (4.0, None)},
    "padded": {"vocab_size": 51},
}
LABELLED = {"label_weight": 0.4, "label_smoothing": 0.1}
CASES = {}


def case(f):
    CASES[f.__name__] = f
    return f


class Ranks:
    """Of one process: its rank, the group, which of V columns are here."""

    def __init__(self, rank, world):
        self.rank, self.world, self.group = rank, world, dist.group.WORLD
        self.widths = WIDTHS[world]
        start = sum(self.widths[:rank])
        self.here = slice(start, start + self.widths[rank])


def loss_of(name):
    return decoupled_kd_loss if name == "decoupled" else kd_loss


def both(loss, student, teacher, *args, want=(True, True), upstream=None, **options):
    """(loss, gradients, statistics)."""
    leaves = [x.detach().clone().requires_grad_(w) for x, w in zip((student, teacher), want, strict=True)]
    value = loss(*leaves, *args, **options)
    value, stats = value if options.get("return_stats") else (value, None)
    up = torch.ones_like(value) if upstream is None else upstream
    grads = iter(torch.autograd.grad(value, [x for x in leaves if x.requires_grad], up))
    return value.detach(), [next(grads) if w else None for w in want], stats


def near(ours, exact, relative, beside=None, absolute=0.0, what=""):
    """The norm of the difference beside that of ``beside``; infinities and NaN are the same."""
    assert ours.shape == exact.shape, (what, ours.shape, exact.shape)
    assert ours.dtype == exact.dtype, (what, ours.dtype, exact.dtype)
    ours, exact = ours.double(), exact.double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    error = torch.where(same, 0.0, ours - exact).norm()
    size = torch.nan_to_num(exact if beside is None else beside.double(), 0.0, 0.0, 0.0).norm()
    assert error <= relative * size + absolute, f"{what}: error {error:.2e} beside {size:.2e}"


# Of the loss, of the gradients; the gradients of 16 bits differ by a rounding of what hardly differs.
TOLERANCES = {F32: (1e-6, 1e-5), F64: (1e-12, 1e-12), F16: (1e-6, 1e-3), BF16: (1e-6, 8e-3)}


def agree(ranks, loss, student, teacher, *args, here=None, group=None, **options):
    """Sharded and whole: the loss, everyone's part of the gradients, the statistics; the loss has everyone's bits."""
    here = ranks.here if here is None else here
    group = ranks.group if group is None else group
    with use_backend("reference"):
        whole, whole_grads, whole_stats = both(loss, student, teacher, *args, **options)
    ours, grads, stats = both(loss, student[..., here], teacher[..., here], *args, group=group, **options)
    of_loss, of_grad = TOLERANCES[min(student.dtype, teacher.dtype, key=lambda d: torch.finfo(d).bits)]
    t = options.get("temperature", 1.0)
    t = t.max().item() if isinstance(t, torch.Tensor) else t
    absolute = (1e-14 if whole.dtype == F64 else 1e-7) * t * t
    near(ours, whole, of_loss, absolute=absolute, what="loss")
    for name, grad, exact in zip(("student", "teacher"), grads, whole_grads, strict=True):
        if grad is not None:
            near(grad, exact[..., here], of_grad, beside=exact, what=f"gradient of the {name}")
    for name, x, exact in zip(stats._fields if stats else (), stats or (), whole_stats or (), strict=True):
        near(x, exact, of_loss, absolute=1e-14 if x.dtype == F64 else 3e-6, what=name)
    same_on_ranks(ours, group)
    return ours, grads


def same_on_ranks(x, group):
    x = x.detach().double().contiguous()
    everybody = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, x, group=group)
    for other in everybody:
        assert torch.equal(other.nan_to_num(1.25), x.nan_to_num(1.25)), "the ranks differ"


@contextmanager
def counted():
    """Bytes that this rank sends in each all-gather."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, sent = getattr(dist, name), []

    def counting(out, own, **options):
        sent.append(own.nbytes)
        return gather(out, own, **options)

    with mock.patch.object(dist, name, counting):
        yield sent


def raises(error, words, call):
    """Before anything is exchanged."""
    with counted() as sent, pytest.raises(error, match=words):
        call()
    assert not sent, "something was exchanged"


def sides(*leading, dtypes=(F32, F32), scale=1.0):
    return [(scale * torch.randn(*leading, V, dtype=F64)).to(dtype) for dtype in dtypes]


# ------------------------------------------------------------------------------------------------- the arithmetic
def masked(dtypes, scale):
    """Rows with -inf here and there, on whole shards, and with what is no logit."""
    s, t = sides(9, dtypes=dtypes, scale=scale)
    s[1, 3:9] = t[1, 3:9] = -math.inf
    s[1, 40:] = t[1, 40:] = -math.inf  # the last shard of two, on both sides
    t[2, :20] = -math.inf  # the first shard of four
    s[3, 5] = -math.inf
    s[4, 2] = math.nan
    s[5, :40] = t[5, :40] = -math.inf
    s[6] = -math.inf
    t[7, 50] = math.inf
    return s, t, torch.tensor([0, 49, -100, 7, 3, 45, -100, 22, 19])


def _arithmetic(ranks, divergence, around):
    loss, options = loss_of(divergence), {**DIVERGENCES[divergence], **AROUND[around], "temperature": 2.0}
    kinds = (
        ((F32, F32), 1.0),
        ((F32, F32), 30.0),
        ((F64, F64), 30.0),
        ((F16, F32), 1.0),
        ((BF16, BF16), 1.0),
    )
    for dtypes, scale in kinds if ranks.world == 2 else kinds[1:3]:
        for reduction, stats in (("none", True), ("mean", False)):
            if reduction == "none":
                s, t, labels = masked(dtypes, scale)
            else:
                s, t = sides(9, dtypes=dtypes, scale=scale)
            more = {"reduction": reduction, "return_stats": stats, **options}
            agree(ranks, loss, s, t, labels, **LABELLED, **more)
            if divergence == "decoupled":
                continue
            agree(ranks, loss, s, t, **more)
            if stats:
                agree(ranks, loss, s, t, labels, ignored_rows="distill", **LABELLED, **more)


for _divergence in DIVERGENCES:
    for _around in AROUND:

        def _one(ranks, divergence=_divergence, around=_around):
            _arithmetic(ranks, divergence, around)

        CASES[f"{_divergence}, {_around}"] = _one


@case
def options_of_rows(ranks):
    labels = torch.tensor([[0, -100, 5], [29, 56, -100]])
    for divergence, more in DIVERGENCES.items():
        s, t = sides(2, 3, dtypes=(F64, F64))
        options = {
            "temperature": torch.rand(2, 3) + 0.5,
            "row_weight": torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]]),
            "standardize": True,
            **LABELLED,
            **more,
        }
        loss = loss_of(divergence)
        for reduction in ("mean", "sum", "none", "batchmean"):
            agree(ranks, loss, s, t, labels, reduction=reduction, return_stats=True, **options)
        agree(ranks, loss, s, t, labels, num_items=5, scale_by_t2=False, **options)
        agree(ranks, loss, s, t, labels, num_items=torch.tensor(7.0), **options)
    for smoothing in (0.0, 0.3, 1.0):
        only = {"label_weight": 1.0, "label_smoothing": smoothing}
        agree(ranks, kd_loss, s, t, labels, **only)
        agree(ranks, kd_loss, s, t, labels, softcap=3.0, return_stats=True, **only)
    agree(ranks, kd_loss, s, t, labels, label_weight=0.0)
    agree(ranks, kd_loss, s[0, 0], t[0, 0])
    agree(ranks, kd_loss, s, t, torch.full_like(labels, -100), label_weight=0.5)


@case
def rows_that_are_not_counted_are_not_read(ranks):
    s, t = sides(3)
    labels = torch.tensor([1, -100, 55])
    s[1], t[1] = math.nan, math.nan
    for divergence, more in DIVERGENCES.items():
        loss, grads = agree(ranks, loss_of(divergence), s, t, labels, label_weight=0.1, **more)
        assert loss.isfinite()
        assert not grads[0][1].any()
        assert not grads[1][1].any()


@case
def no_rows(ranks):
    loss, grads, stats = both(
        kd_loss,
        *(torch.zeros(0, ranks.widths[ranks.rank]) for _ in "st"),
        group=ranks.group,
        return_stats=True,
    )
    assert loss == 0
    assert grads[0].shape == (0, ranks.widths[ranks.rank])
    assert stats.kl.isnan()


@case
def student_and_teacher_the_same(ranks):
    s = 10 * torch.randn(4, V)
    for name, more in DIVERGENCES.items():
        if name != "decoupled":
            loss, grads = agree(ranks, kd_loss, s, s.clone(), **more)
            assert loss == 0
            assert not grads[0].any()


@case
def confident_rows_keep_their_digits(ranks):
    """Nearly all mass in one place: gradients of reverse KL, jsd and tvd are small differences, on any rank."""
    for place in (0, 39, 40, V - 1):
        s, t = sides(3)
        s[:, place] += 20
        t[:, place] += 19
        for name, more in DIVERGENCES.items():
            labels = () if name != "decoupled" else (torch.tensor([0, place, 5]),)
            agree(ranks, loss_of(name), s, t, *labels, **more)


@case
def views_are_read_in_place(ranks):
    base = torch.randn(4, 7, V)
    agree(ranks, kd_loss, base[:, :-1], base[:, 1:], temperature=2.0, divergence="reverse_kl")


@case
def fp16_gradients_do_not_underflow(ranks):
    s, t = sides(64, dtypes=(F16, F16))
    options = {"num_items": 1 << 22, "softcap": 20.0}
    up = torch.tensor(2.0**20)
    wide, _, _ = both(kd_loss, s.double(), t.double(), upstream=up.double(), **options)
    exact = both(kd_loss, s.double(), t.double(), upstream=up.double(), **options)[1]
    ours = both(kd_loss, s[:, ranks.here], t[:, ranks.here], upstream=up, group=ranks.group, **options)
    near(ours[0].double(), wide, 1e-5)
    for grad, whole in zip(ours[1], exact, strict=True):
        near(grad.double(), whole[:, ranks.here], 1e-3, beside=whole)


# ------------------------------------------------------------------------------------------------ what is exchanged
@case
def exchanges(ranks):
    """How many all-gathers, and the bytes per row that a rank sends: the table of docs/parallel.md."""
    rows = 6
    s, t = (x[:, ranks.here] for x in sides(rows))
    labels = torch.arange(rows)
    jsd = {"divergence": "jsd"}
    # (arguments, options, gradients of which sides) -> doubles per row in each all-gather; 0: one number
    table = [
        ((), {}, (1, 0), [5]),
        ((), {}, (0, 0), [5]),
        ((), {}, (1, 1), [7]),
        ((), {"divergence": "reverse_kl"}, (1, 0), [7]),
        ((), {"vocab_size": 50}, (1, 0), [0, 5]),
        ((labels,), {"label_weight": 0.0}, (1, 0), [0, 5]),
        ((labels,), {"label_weight": 0.5}, (1, 0), [0, 8]),
        ((labels,), {"label_weight": 0.5, "label_smoothing": 0.1}, (1, 0), [0, 10]),
        ((labels,), {"label_weight": 1.0}, (1, 0), [0, 4]),
        ((), jsd, (1, 0), [4, 5]),
        ((), {"divergence": "tvd"}, (1, 1), [4, 9]),
        ((), jsd, (0, 0), [4, 1]),
        ((), {"softcap": 5.0}, (1, 0), [7]),
        ((), {"standardize": True}, (1, 0), [6, 7, 1]),
        ((), {"standardize": True}, (0, 0), [6, 7]),
        ((), {"standardize": True, **jsd}, (1, 0), [6, 6, 5, 1]),
        ((), {"return_stats": True}, (1, 0), [11]),
        ((labels,), "decoupled", (1, 0), [0, 9]),
        ((labels,), "decoupled, statistics", (1, 0), [0, 23]),
    ]
    for args, options, wants, expected in table:
        loss = kd_loss
        if isinstance(options, str):
            loss, options = decoupled_kd_loss, {"return_stats": "statistics" in options}
        for chunk in (1 << 20, 1):
            leaves = [x.detach().clone().requires_grad_(bool(w)) for x, w in zip((s, t), wants, strict=True)]
            with counted() as sent, mock.patch.object(kd_ops, "_CHUNK_LOGITS", chunk):
                value = loss(*leaves, *args, group=ranks.group, **options)
                value = value[0] if isinstance(value, tuple) else value
                if any(wants):
                    value.backward()
            assert sent == [8 * rows * k if k else 8 for k in expected], (options, wants, sent)


@case
def chunks_of_rows(ranks):
    """Do not change a bit of the gradient."""
    s, t = (x[..., ranks.here] for x in sides(3, 5))
    options = {"divergence": "jsd", "standardize": True, "reduction": "none", "group": ranks.group}
    loss, grads, _ = both(kd_loss, s, t, **options)
    with mock.patch.object(kd_ops, "_CHUNK_LOGITS", 64):
        same, same_grads, _ = both(kd_loss, s, t, **options)
    assert torch.equal(loss, same)
    for a, b in zip(grads, same_grads, strict=True):
        near(a, b, 1e-6)


@case
def subgroups(ranks):
    """Ranks of a group that is not the world, its ranks in another order than the world's where there are enough."""
    members = [0, 1] if ranks.world == 2 else [3, 1]
    group = dist.new_group(members, sort_ranks=False) if ranks.world > 2 else dist.new_group(members)
    s, t = sides(4)
    if ranks.rank in members:
        first = members.index(ranks.rank) == 0
        here = slice(0, 33) if first else slice(33, V)
        labels = torch.tensor([0, 56, 33, 32])
        agree(ranks, kd_loss, s, t, labels, here=here, group=group, **LABELLED)
    else:
        raises(ValueError, "this rank is not in", lambda: kd_loss(s, t, group=group))


# ------------------------------------------------------------------------------------------------------- autograd
@case
def backward_twice_and_upstream(ranks):
    s, t = (x[:, ranks.here].requires_grad_() for x in sides(4))
    for more in DIVERGENCES.values():
        if "target_weight" in more:
            continue
        loss = kd_loss(s, t, group=ranks.group, **more)
        plain = torch.autograd.grad(loss, (s, t), retain_graph=True)
        three = torch.autograd.grad(3 * loss, (s, t), retain_graph=True)
        again = torch.autograd.grad(loss, (s, t))
        for a, b, c in zip(plain, three, again, strict=True):
            assert torch.equal(a, c)
            near(b, 3 * a, 1e-6)
        loss = kd_loss(s, t, group=ranks.group, **more)
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, s, create_graph=True)
    with torch.no_grad():
        assert not kd_loss(s, t, group=ranks.group).requires_grad
    with torch.inference_mode():
        kd_loss(s.detach(), t.detach(), group=ranks.group)
    _, grads, _ = both(kd_loss, s, t, want=(False, True), group=ranks.group)
    near(grads[1], plain_teacher(s, t, ranks), 1e-6)


def plain_teacher(s, t, ranks):
    return both(kd_loss, s, t, group=ranks.group)[1][1]


@case
def modules(ranks):
    s, t = (x[:, ranks.here] for x in sides(4))
    labels = torch.tensor([0, 56, 33, -100])
    ours = KDLoss(temperature=2.0, label_weight=0.3, group=ranks.group)
    assert "group=" in repr(ours)
    assert torch.equal(
        ours(s, t, labels), kd_loss(s, t, labels, temperature=2.0, label_weight=0.3, group=ranks.group)
    )
    ours = DecoupledKDLoss(group=ranks.group)
    assert torch.equal(ours(s, t, labels), decoupled_kd_loss(s, t, labels, group=ranks.group))


@case
def compiled(ranks):
    """A graph break; an error where none is allowed."""
    if ranks.world > 2:
        return  # the same, and slow
    s, t = (x[:, ranks.here].requires_grad_() for x in sides(4))

    def step(s, t):
        return 2 * kd_loss(s * 2, t, group=ranks.group)

    loss = torch.compile(step, backend="eager")(s, t)
    assert torch.equal(loss, step(s, t))
    assert torch.equal(torch.autograd.grad(loss, s)[0], torch.autograd.grad(step(s, t), s)[0])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)(s, t)


# ------------------------------------------------------------------------------------------------------- DTensor
def _distributed(x, mesh, placements, requires_grad=True):
    return distribute_tensor(x.detach().clone(), mesh, placements).detach().requires_grad_(requires_grad)


@case
def dtensors(ranks):
    """Uneven shards; the gradient is a DTensor of the same placements."""
    mesh = init_device_mesh("cpu", (ranks.world,))
    labels = torch.tensor([0, 56, 33, -100])
    for width, divergence in ((V, "forward_kl"), (5, "jsd"), (V, "decoupled")):
        s, t = (x[:, :width] for x in sides(4))
        y = labels.clamp_max(width - 1)
        more = {"standardize": True, **LABELLED, **DIVERGENCES[divergence]}
        loss = loss_of(divergence)
        with use_backend("reference"):
            whole, grads, _ = both(loss, s, t, y, **more)
        leaves = [_distributed(x, mesh, [Shard(-1)]) for x in (s, t)]
        with counted() as sent:
            ours = loss(*leaves, y, **more)
        assert 8 not in sent, "the offset is known"
        assert type(ours) is torch.Tensor
        near(ours.detach(), whole, 1e-6)
        ours.backward()
        for leaf, exact in zip(leaves, grads, strict=True):
            assert leaf.grad.placements == (Shard(1),)
            near(leaf.grad.full_tensor(), exact, 1e-5)
    # labels and the like: whole on every rank
    y = distribute_tensor(labels, mesh, [Replicate()])
    weight = distribute_tensor(torch.rand(4), mesh, [Replicate()])
    s, t = sides(4)
    ours = kd_loss(
        *(_distributed(x, mesh, [Shard(1)]) for x in (s, t)), y, label_weight=0.3, row_weight=weight
    )
    near(ours.detach(), kd_loss(s, t, labels, label_weight=0.3, row_weight=weight.to_local()), 1e-5)
    # nothing split: no group
    leaves = [_distributed(x, mesh, [Replicate()]) for x in (s, t)]
    kd_loss(*leaves).backward()
    near(leaves[0].grad.to_local(), both(kd_loss, s, t)[1][0], 1e-5)
    # a group that is the mesh's may be named
    split = [_distributed(x, mesh, [Shard(1)]) for x in (s, t)]
    assert torch.equal(kd_loss(*split, group=mesh.get_group()), kd_loss(*split))


@case
def dtensors_on_two_dimensions(ranks):
    """[rows' dimension, columns' dimension]: copies over the first."""
    mesh = init_device_mesh("cpu", (ranks.world // 2, 2), mesh_dim_names=("data", "vocab"))
    s, t = sides(4)
    leaves = [_distributed(x, mesh, [Replicate(), Shard(1)]) for x in (s, t)]
    loss = kd_loss(*leaves, temperature=2.0)
    loss.backward()
    whole, grads, _ = both(kd_loss, s, t, temperature=2.0)
    near(loss.detach(), whole, 1e-5)
    for leaf, exact in zip(leaves, grads, strict=True):
        near(leaf.grad.full_tensor(), exact, 1e-5)


@case
def wrong_dtensors(ranks):
    mesh = init_device_mesh("cpu", (ranks.world,))
    s, t = sides(4)
    split, whole = ([_distributed(x, mesh, p) for x in (s, t)] for p in ([Shard(1)], [Replicate()]))
    by_rows = [_distributed(x, mesh, [Shard(0)]) for x in (s, t)]
    partial = DTensor.from_local(s, mesh, [Partial()])
    raises(TypeError, "teacher_logits is Tensor: both must be", lambda: kd_loss(split[0], t))
    raises(TypeError, "student_logits is Tensor: both must be", lambda: kd_loss(s, split[1]))
    raises(ValueError, "same shape, mesh and placements", lambda: kd_loss(split[0], whole[1]))
    raises(ValueError, "only its last dimension may be split.*num_items", lambda: kd_loss(*by_rows))
    raises(
        ValueError,
        r"Partial on mesh dimension 0.*redistribute.*Shard\(-1\)",
        lambda: kd_loss(partial, split[1]),
    )
    raises(ValueError, "no rank holds a part", lambda: kd_loss(*whole, group=ranks.group))
    narrow = _distributed(t[:, :50], mesh, [Shard(1)])
    raises(ValueError, "pad the narrower", lambda: kd_loss(split[0], narrow, vocab_size=50))
    labels = distribute_tensor(torch.zeros(4, dtype=torch.int64), mesh, [Shard(0)])
    raises(
        ValueError,
        "labels is a DTensor with placements.*needs all",
        lambda: kd_loss(*split, labels, label_weight=0.5),
    )
    raises(ValueError, "inplace=True cannot", lambda: kd_loss(*split, inplace=True))


# ------------------------------------------------------------------------------------------------------- arguments
@case
def wrong_arguments(ranks):
    s, t = (x[:, ranks.here] for x in sides(4))
    group = ranks.group
    labels = torch.tensor([0, 56, 33, -100])
    raises(TypeError, "group must be a torch.distributed.ProcessGroup", lambda: kd_loss(s, t, group="world"))
    mesh = init_device_mesh("cpu", (ranks.world,))
    raises(TypeError, r"mesh.get_group\(\)", lambda: KDLoss(group=mesh))
    raises(
        ValueError, "inplace=True cannot be used with group", lambda: kd_loss(s, t, group=group, inplace=True)
    )
    raises(ValueError, "same columns on each rank", lambda: kd_loss(s, torch.zeros(4, 99), group=group))
    raises(ValueError, "same columns on each rank", lambda: kd_loss(s, t[:2], group=group))
    raises(TypeError, "teacher_logits must be float32", lambda: kd_loss(s, t.long(), group=group))
    raises(ValueError, "vocab_size must be at least 2", lambda: kd_loss(s, t, group=group, vocab_size=1))
    raises(ValueError, "without label_weight", lambda: kd_loss(s, t, labels, group=group))
    raises(ValueError, "labels must have", lambda: kd_loss(s, t, labels[:2], label_weight=0.5, group=group))
    raises(ValueError, "num_items", lambda: kd_loss(s, t, num_items=0, group=group))
    raises(ValueError, "first dimension", lambda: kd_loss(s[0], t[0], reduction="batchmean", group=group))
    # Known once the widths are: the same error on all ranks, and nobody waits for anybody.
    with pytest.raises(ValueError, match=r"labels must be in \[0, 57\).*got 57 at index \[3\]"):
        kd_loss(s, t, torch.tensor([0, 1, 2, 57]), label_weight=0.5, group=group)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 40\)"):
        kd_loss(s, t, labels, label_weight=0.5, vocab_size=40, group=group)
    with pytest.raises(ValueError, match="between 2 and the 57 columns"):
        kd_loss(s, t, vocab_size=58, group=group)
    # Where values are not looked at (a device), the rows concerned are NaN.
    with mock.patch("fasttransfer.kd_group.values_visible", return_value=False):
        y = torch.tensor([0, 1, 2, 57])
        loss = kd_loss(s, t, y, label_weight=0.5, reduction="none", group=group)
        assert loss.isnan().tolist() == [False, False, False, True]
        assert kd_loss(s, t, vocab_size=58, group=group).isnan()
        near(
            kd_loss(s, t, labels, label_weight=0.5, group=group),
            kd_loss(s, t, labels.clone(), label_weight=0.5, group=group),
            0.0,
        )


@case
def ranks_that_differ(ranks):
    """Under FASTTRANSFER_CHECK=1: an error on all of them."""
    s, t = (x[:, ranks.here] for x in sides(4))
    labels = torch.tensor([0, 56, 33, -100])
    with mock.patch.object(checks, "_CHECK_DEVICES", True):
        assert kd_loss(s, t, labels, label_weight=0.5, group=ranks.group).isfinite()
        rows = 3 if ranks.rank == 0 else 4
        with pytest.raises(ValueError, match=r"must pass the same rows .*: \[3, 4"):
            kd_loss(s[:rows], t[:rows], group=ranks.group)
        with pytest.raises(ValueError, match="the same shapes, dtypes, options"):
            kd_loss(s, t, temperature=1.0 + ranks.rank, group=ranks.group)
        with pytest.raises(ValueError, match="the same labels"):
            kd_loss(s, t, labels.clamp_max(50 + ranks.rank), label_weight=0.5, group=ranks.group)


# ---------------------------------------------------------------------------------------------------- rows split
@case
def rows_split_over_ranks(ranks):
    """num_items summed over the ranks: a sum of gradients, or DDP's mean of them."""
    model, x, t = nn.Linear(6, 9), torch.randn(3 * ranks.world, 6), torch.randn(3 * ranks.world, 9)
    labels = torch.arange(len(x)) % 9
    labels[[0, 1, 4]] = -100  # ranks count different numbers of rows
    options = {"temperature": 2.0, "label_weight": 0.3}
    whole = kd_loss(model(x), t, labels, **options)
    exact = torch.autograd.grad(whole, list(model.parameters()))
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    items = (labels[mine] != -100).sum()
    dist.all_reduce(items)

    loss = kd_loss(model(x[mine]), t[mine], labels[mine], num_items=items, **options)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for grad, e in zip(grads, exact, strict=True):
        dist.all_reduce(grad)
        near(grad, e, 1e-5)
    total = loss.detach().clone()
    dist.all_reduce(total)
    near(total, whole.detach(), 1e-6)

    ddp = DistributedDataParallel(model)
    loss = kd_loss(ddp(x[mine]), t[mine], labels[mine], num_items=items / ranks.world, **options)
    loss.backward()
    for parameter, e in zip(model.parameters(), exact, strict=True):
        near(parameter.grad, e, 1e-5)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    near(mean / ranks.world, whole.detach(), 1e-6)


@case
def a_head_split_by_columns(ranks):
    """A tensor-parallel step is the step of the whole model, the hidden states' gradient summed over the ranks."""
    hidden, head = torch.randn(5, 6, requires_grad=True), torch.randn(V, 6)
    teacher, labels = torch.randn(5, V), torch.tensor([0, 56, 20, 39, 40])
    whole_head = head.clone().requires_grad_()
    options = {"temperature": 2.0, **LABELLED}
    exact = torch.autograd.grad(
        kd_loss(F.linear(hidden, whole_head), teacher, labels, **options), (hidden, whole_head)
    )
    mine = head[ranks.here].clone().requires_grad_()
    logits = F.linear(hidden, mine)
    loss = kd_loss(logits, teacher[:, ranks.here], labels, group=ranks.group, **options)
    of_hidden, of_head = torch.autograd.grad(loss, (hidden, mine))
    dist.all_reduce(of_hidden)
    near(of_hidden, exact[0], 1e-5)
    near(of_head, exact[1][ranks.here], 1e-5, beside=exact[1])


@case
def documentation(ranks):
    """The blocks of docs/parallel.md, as they stand, in one namespace."""
    text = (Path(__file__).parent.parent / "docs" / "parallel.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/parallel.md", "exec"), namespace)


CASES |= sharded_params_worker.CASES


def run(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    ranks = Ranks(rank, world)
    results = {}
    for name, test in CASES.items():
        torch.manual_seed(0)
        try:
            test(ranks)
        except BaseException:  # pytest.raises fails with one that is no Exception
            results[name] = traceback.format_exc()
            break  # what the others now wait for does not come
        results[name] = ""
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    if len(results) == len(CASES) and not any(results.values()):
        dist.destroy_process_group()
