"""Cases of tests/sharded_worker.py for L2SP, blend and EMA of parameters that are split over the ranks.

Each against a single process: the same model, whole, on every rank. All ranks draw the same random numbers.
"""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fasttransfer import (
    EMA,
    L2SP,
    blend,
    blend_,
    blend_many,
    blend_many_,
    l2sp_add_grad_,
    l2sp_penalty,
    l2sp_prox_,
)

CASES = {}
STRENGTH = {"0.*": 0.3, "*": 0.7}


def case(f):
    CASES[f.__name__] = f
    return f


def net():
    """Rows that no number of ranks divides, some with fewer rows than ranks; a buffer of integers."""
    model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Linear(6, 1))
    return (
        model.eval()
    )  # in training nothing would be left of the first bias but rounding, which Adam makes large


def moved(model, scale=0.1):
    """Another model of the same names."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * torch.randn_like(p)
    other[1].running_mean += torch.randn(5)
    return other


def layouts(ranks):
    """How a model is split: FSDP2 at two depths; with a layer left whole; HSDP; over tensor parallelism."""

    def flat(model):
        fully_shard(model[0])
        return fully_shard(model)

    def by_columns(model):
        # FSDP2 splits only dimension 0 unevenly.
        return fully_shard(model, shard_placement_fn=lambda p: Shard(int(p.dim() == 2 and p.shape[1] == 8)))

    def ignoring(model):
        return fully_shard(model, ignored_params=set(model[2].parameters()))

    yield "fsdp", flat, {1}
    if ranks.world == 2:
        yield "columns", by_columns, {1}
        yield "ignored", ignoring, {1}
    if ranks.world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        yield "hsdp", lambda model: fully_shard(model, mesh=mesh), {1}

        def tensor_parallel(model):
            parallelize_module(model, mesh["shard"], {"2": ColwiseParallel(), "3": RowwiseParallel()})
            return fully_shard(model, mesh=mesh["replicate"])

        yield "tensor parallel", tensor_parallel, {1, 2}


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(ours, exact, what=""):
    torch.testing.assert_close(
        full(ours).double(), exact.double(), rtol=1e-6, atol=1e-6, msg=lambda m: f"{what}: {m}"
    )


def same_models(ours, exact, what=""):
    state = exact.state_dict()
    for name, t in ours.state_dict().items():
        same(t.detach(), state[name], f"{what} {name}")


class silent:
    """No collective, or as many as said, and those of one number."""

    def __init__(self, *counts):
        self.counts, self.mode = set(counts) or {0}, CommDebugMode()

    def __enter__(self):
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        if error[0] is None:
            assert self.mode.get_total_counts() in self.counts, self.mode.get_comm_counts()


def train_step(model, x, optimizer=None):
    model(x).square().mean().backward()


def pair(split):
    """The same model, whole and split."""
    whole = net()
    return whole, split(copy.deepcopy(whole))


def each(test):
    """A case for every layout."""

    def run(ranks):
        for name, split, reduces in layouts(ranks):
            torch.manual_seed(0)
            try:
                test(ranks, split, reduces)
            except BaseException as error:
                error.add_note(f"layout: {name}")
                raise

    run.__name__ = test.__name__
    return run


# ----------------------------------------------------------------------------------------------------------- L2SP
@case
@each
def penalty_and_gradients(ranks, split, reduces):
    whole, model = pair(split)
    importance = {name: torch.rand_like(p) for name, p in whole.named_parameters() if p.dim() == 2}
    start = moved(whole).state_dict()  # whole on every rank
    del start["3.bias"]
    options = {"start": start, "importance": importance, "new_strength": 0.2}
    exact, ours = L2SP(whole, STRENGTH, **options), L2SP(model, STRENGTH, **options)
    value = exact()
    value.backward()
    with silent(*reduces):
        found = ours()
    assert type(found) is torch.Tensor
    same(found, value)
    with silent():
        found.backward()
    for p, e in zip(model.parameters(), whole.parameters(), strict=True):
        assert type(p.grad) is type(p.data)
        assert getattr(p.grad, "placements", None) == getattr(p, "placements", None)
        same(p.grad, e.grad)
    # in one pass, on top of these gradients; then where there are none
    for _ in range(2):
        value = exact.add_grad_(grad_scale=0.5)
        with silent(*reduces):
            same(ours.add_grad_(grad_scale=0.5), value)
        for p, e in zip(model.parameters(), whole.parameters(), strict=True):
            same(p.grad, e.grad)
            p.grad = e.grad = None
    with silent():
        ours.add_grad_(over_ranks=False)
        before = [p._version for p in model.parameters()]
        ours.prox_(0.3)
    exact.add_grad_()
    exact.prox_(0.3)
    assert all(p._version > b for p, b in zip(model.parameters(), before, strict=True))
    same_models(model, whole)
    with silent(*reduces):
        distances = ours.distance()
    assert distances.keys() == exact.distance().keys()
    for name, e in exact.distance().items():
        same(distances[name], e, name)


@case
@each
def hooks_and_states(ranks, split, _):
    """Training with the hooks; a state of start points goes into a new L2SP, split or whole."""
    whole, model = pair(split)
    for by, kind in (("grad", torch.optim.SGD), ("prox", torch.optim.AdamW)):
        for m, r in ((whole, L2SP(whole, 0.5)), (model, ours := L2SP(model, 0.5))):
            optimizer = kind(m.parameters(), lr=0.05)
            handle = r.attach(optimizer, by=by)
            for k in range(3):
                torch.manual_seed(k)
                train_step(m, torch.randn(4, 8))  # the same on all ranks: so is the mean of the gradients
                with silent():
                    optimizer.step()
                optimizer.zero_grad()
            handle.remove()
        for (name, p), e in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(
                full(p), e, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    fresh = L2SP(model, 0.5)
    fresh.load_state_dict(ours.state_dict())
    same(fresh(), ours())
    gathered = dcp.get_model_state_dict(ours, options=dcp.StateDictOptions(full_state_dict=True))
    for name, t in ours.state_dict().items():
        same(t, gathered[name])
    fresh = L2SP(model, 0.5)
    fresh.load_state_dict(gathered)
    same(fresh(), ours())


@case
def lists_of_dtensors(ranks):
    """Empty shards, scalars, mixed dtypes, tensors that are whole beside those that are not."""
    mesh = init_device_mesh("cpu", (ranks.world,))
    shapes, placements = [(5, 3), (1, 4), (3, 2), (), (7,)], [Shard(0), Shard(0), Shard(1), Replicate(), None]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32]
    params = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    start = [torch.randn_like(p) for p in params]

    def spread(tensors):
        rows = zip(tensors, placements, strict=True)
        return [t.clone() if p is None else distribute_tensor(t, mesh, [p]).detach() for t, p in rows]

    whole = [p.clone().requires_grad_() for p in params]
    ours = [p.requires_grad_() for p in spread(params)]
    exact = l2sp_penalty(whole, start, 0.3)
    points = spread(start)
    same(l2sp_penalty(ours, points, 0.3), exact.detach())
    same(l2sp_penalty(ours, start, 0.3), exact.detach())
    with torch.no_grad(), silent(1):
        l2sp_penalty(ours, start, 0.3)
    with torch.no_grad(), silent():  # nothing is split
        same(l2sp_penalty(ours[3:], start[3:], 0.3), l2sp_penalty(whole[3:], start[3:], 0.3))
    exact = l2sp_add_grad_(whole, start, 0.3)
    with silent(1):
        found = l2sp_add_grad_(ours, points, 0.3)
    same(found, exact)
    for p, e in zip(ours, whole, strict=True):
        same(p.grad, e.grad)
    l2sp_prox_(whole, start, 0.3, 0.1)
    with silent():
        l2sp_prox_(ours, start, 0.3, 0.1)
        blend_(ours, start, 0.3)
        blend_many_(ours, [points, start], 0.3, weights=[0.25, 0.75])
    blend_(whole, start, 0.3)
    blend_many_(whole, [start, start], 0.3, weights=[0.25, 0.75])
    for p, e in zip(ours, whole, strict=True):
        same(p.detach(), e.detach())


@case
def outermost_module_that_is_gathered(ranks):
    """FSDP2 leaves it gathered after a forward: the penalty between forward and backward, writes between forwards."""
    whole, model = pair(fully_shard)
    exact, ours = L2SP(whole, 0.5, start=(start := moved(whole))), L2SP(model, 0.5, start=start)
    x = torch.randn(4, 8)
    for m, r in ((whole, exact), (model, ours)):
        (m(x).square().mean() + r()).backward()
    for p, e in zip(model.parameters(), whole.parameters(), strict=True):
        same(p.grad, e.grad)
    averages = EMA(whole, 0.5), EMA(model, 0.5)
    with torch.no_grad():
        for m, ema in zip((whole, model), averages, strict=True):
            m(x)
            for _ in range(2):
                blend_(m, start, 0.5)
                ema.update(m)
                m(x)
        with averages[0].applied(whole), averages[1].applied(model):
            same(model(x), whole(x))
        same(model(x), whole(x))
    assert any(isinstance(p, DTensor) for p in L2SP(model, 1.0).start.tensors().values())


@case
def start_points_in_a_checkpoint(ranks):
    """Each rank maps the files and takes its slices."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    whole, model = pair(fully_shard)
    with tempfile.TemporaryDirectory() as folder:
        save_file((start := moved(whole)).state_dict(), f"{folder}/a.safetensors")
        exact, ours = L2SP(whole, 0.5, start=start), L2SP(model, 0.5, start=folder)
        for r in (exact, ours):
            r().backward()
        same(ours.add_grad_(), exact.add_grad_())
        for p, e in zip(model.parameters(), whole.parameters(), strict=True):
            same(p.grad, e.grad)
        for name, e in exact.distance().items():
            same(ours.distance()[name], e, name)
        ours.prox_(0.3)
    exact.prox_(0.3)
    same_models(model, whole)


# ------------------------------------------------------------------------------------------------------ blend, EMA
@case
@each
def blending_models(ranks, split, _):
    whole, model = pair(split)
    source = moved(whole)
    split_source = split(copy.deepcopy(source))
    with silent():
        blend_(model, split_source, {"0.*": 0.3, "*": 0.8})
    blend_(whole, source, {"0.*": 0.3, "*": 0.8})
    same_models(model, whole)
    other = moved(source)
    with silent():  # whole state dicts
        blend_many_(model, [source.state_dict(), other.state_dict()], torch.tensor(0.4), source_scale=0.7)
        blend_(model, source.state_dict(), 0.5, buffers="copy")
    blend_many_(whole, [source, other], torch.tensor(0.4), source_scale=0.7)
    blend_(whole, source, 0.5, buffers="copy")
    same_models(model, whole)


@case
@each
def differentiable_blends(ranks, split, _):
    whole, model = pair(split)
    source = moved(whole)
    upstream = {name: torch.randn_like(p) for name, p in whole.named_parameters()}

    def run(target, sources, alpha, scale):
        mixed = blend_many(target, sources, {"0.*": alpha, "*": 0.25}, source_scale=scale)
        total = torch.zeros(())
        for name, u in upstream.items():
            t = mixed[name]
            if isinstance(t, DTensor):  # this rank's part of the sum
                assert t.placements == dict(target.named_parameters())[name].placements
                t, u = (
                    t.to_local(),
                    distribute_tensor(u, t.device_mesh, t.placements, src_data_rank=None).to_local(),
                )
            total = total + (t * u).sum()
        return mixed, torch.autograd.grad(
            total, [*target.parameters(), *sources[0].parameters(), alpha, scale]
        )

    coefficients = [torch.tensor(a, requires_grad=True) for a in (0.3, 0.9)]
    exact, grads = run(whole, [source, source.state_dict()], *coefficients)
    split_source = split(copy.deepcopy(source))
    ours, found = run(model, [split_source, source.state_dict()], *coefficients)
    for name, t in exact.items():
        same(ours[name].detach(), t.detach(), name)
    for g, e in zip(found, grads, strict=True):
        same(g, e)


@case
@each
def averages(ranks, split, _):
    whole, model = pair(split)
    double = {"warmup": "ratio", "buffers": "blend", "dtype": torch.float64, "capturable": True}
    for options in ({}, double):
        exact, ours = EMA(whole, 0.6, **options), EMA(model, 0.6, **options)
        for k in range(3):
            torch.manual_seed(k)
            with torch.no_grad():
                for p, e in zip(model.parameters(), whole.parameters(), strict=True):
                    step = torch.randn_like(e)
                    e += step
                    blend_(p, step, 1.0, source_scale=1.0)
            exact.update(whole)
            with silent():
                ours.update(model)
        for name, t in exact.average().items():
            same(ours.average()[name], t, name)
            assert ours.average()[name].dtype == t.dtype
        kept = copy.deepcopy(whole)
        with silent(), exact.applied(whole), ours.applied(model):
            pass
        same_models(model, kept)
        with exact.applied(whole), ours.applied(model):
            same_models(model, whole)
        with silent():
            ours.copy_to(model)
        exact.copy_to(whole)
        same_models(model, whole)
        for state in (ours.state_dict(), exact.state_dict()):  # split; whole on every rank
            fresh = EMA(model, 0.6, **options)
            fresh.load_state_dict(state)
            assert fresh.n_averaged == 3
            for name, t in exact.average().items():
                same(fresh.average()[name], t, name)
        gathered = dcp.get_model_state_dict(ours, options=dcp.StateDictOptions(full_state_dict=True))
        for name, t in exact.state_dict().items():
            same(gathered[name], t, name)
    single = EMA(net())
    single.update(whole)
    with silent():  # an average of a single process, applied to a model that is split
        single.copy_to(model)
    same_models(model, whole)


# -------------------------------------------------------------------------------------------- what is refused, DDP
@case
def made_before_fully_shard(ranks):
    """Start points are cut at each call; an average cannot be updated."""
    whole = net()
    model = moved(whole)
    reg, ema = L2SP(model, 0.5, start=whole), EMA(model)
    exact = reg().detach()
    fully_shard(model)
    same(reg(), exact)
    same(reg.add_grad_(), exact)
    with pytest.raises(ValueError, match=r"model's '0.weight' is a DTensor .*average of '0.weight' .*whole"):
        ema.update(model)


@case
def wrong_dtensors_of_parameters(ranks):
    mesh = init_device_mesh("cpu", (ranks.world,))
    whole = torch.randn(5, 3)
    rows, columns, copies = (distribute_tensor(whole, mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))
    partial = DTensor.from_local(whole, mesh, [Partial()])

    def raises(words, call):
        with silent(), pytest.raises(ValueError, match=words):
            call()

    leaf = rows.detach().clone().requires_grad_()
    named = {"w": partial}, {"w": rows}
    raises(r"params\['w'\] is a DTensor that is Partial on mesh dim", lambda: l2sp_penalty(*named, 1.0))
    raises(
        r"start point of params\[0\] is a DTensor that is Partial",
        lambda: l2sp_penalty([rows], [partial], 1.0),
    )
    raises("target is a DTensor that is Partial", lambda: blend_(partial, rows, 0.5))
    raises("split differently.*Shard.dim=1.*full_tensor", lambda: l2sp_penalty([rows], [columns], 1.0))
    raises("split differently", lambda: blend(rows, columns, 0.5))
    raises(r"source of target is a DTensor .*full_tensor\(\)", lambda: blend_(whole, rows, 0.5))
    raises(
        "requires grad and is whole on every rank", lambda: blend(rows, whole.clone().requires_grad_(), 0.5)
    )
    alpha = distribute_tensor(torch.ones(1), mesh, [Shard(0)])
    raises("alpha is a DTensor", lambda: blend(rows, rows, alpha))
    raises("transform is a DTensor", lambda: blend_(rows, rows, 0.5, transform=torch.eye(3)))
    raises("has shape", lambda: blend_(rows, whole[:4], 0.5))
    leaf.grad = copies.detach().clone()
    raises("gradient of params.*split differently", lambda: l2sp_add_grad_([leaf], [rows], 1.0))
    beside = torch.zeros(4, 3, requires_grad=True)
    beside.grad = torch.zeros(4, 3).to_sparse()
    written = rows.detach().clone().requires_grad_()
    written.grad = rows.detach().clone()
    with pytest.raises(TypeError, match="dense"):
        l2sp_add_grad_([written, beside], [columns.full_tensor() + 1, torch.zeros(4, 3)], 1.0)
    same(written.grad, whole)  # nothing has been added
    raises("not a leaf", lambda: l2sp_add_grad_([leaf * 1], [rows], 1.0))
    model = fully_shard(net())
    raises("kept beside it", lambda: EMA(model, device="cuda"))
    same(leaf.grad, whole)
    # What a transform makes of a whole source is cut like any.
    target, matrix = rows.clone(), torch.randn(3, 4)
    source = torch.randn(5, 4)
    blend_(target, source, 0.5, transform=matrix)
    same(target, blend(whole, source, 0.5, transform=matrix))
    assert torch.equal(full(blend(copies, whole, 0.5)), whole)


@case
def ddp(ranks):
    """Each rank adds the penalty to its own loss, and it counts once."""
    whole = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(4 * ranks.world, 6)
    mine = x[4 * ranks.rank : 4 * ranks.rank + 4]
    for way in ("autograd", "add_grad_"):
        single = copy.deepcopy(whole)
        model = DistributedDataParallel(copy.deepcopy(whole))
        pairs = []
        for m, wrapped, data in ((single, single, x), (model.module, model, mine)):
            start = {name: p + 0.1 for name, p in whole.state_dict().items()}
            reg, ema = L2SP(m, 0.5, start=start), EMA(m, 0.5)
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                loss = wrapped(data).square().mean()
                if way == "autograd":
                    (loss + reg()).backward()
                else:
                    loss.backward()
                    with silent():
                        reg.add_grad_()
                optimizer.step()
                ema.update(m)
            pairs.append((m, ema))
        (exact, exact_ema), (ours, ema) = pairs
        same_models(ours, exact)
        for name, t in exact_ema.average().items():
            same(ema.average()[name], t)
    # The wrapper's own names begin with "module.".
    assert L2SP(model, 0.5, include="module.0.*").distance().keys() == {"module.0.weight", "module.0.bias"}
    EMA(model).update(model)
