"""L2SP: start points in another dtype, on another device, and in a checkpoint.

There is no second device here. What moves the constants is therefore run on the CPU as if they were away, through lanes
that write down what is asked of them; `CudaLane` runs against stand-ins for CUDA's streams and events.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fasttransfer import L2SP, l2sp_stream
from tests.nets import Net, move, tied
from tests.oracle import assert_norm_close

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def results(model, reg):
    """Everything that an L2SP gives, from one state of the model: values, gradients, a proximal step, distances."""
    model.zero_grad(set_to_none=True)
    value = reg()
    gradients = torch.autograd.grad(
        value, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    with torch.no_grad():
        plain = reg()
    added = reg.add_grad_()
    twice = reg.add_grad_(grad_scale=0.5)
    grads = [p.grad for p in model.parameters()]
    distance = reg.distance()
    before = copy.deepcopy(model.state_dict())
    reg.prox_(0.3)
    moved = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle = reg.attach(optimizer)
    optimizer.step()
    handle.remove()
    stepped = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(before)
    values = [value, plain, added, twice]
    return values, [*gradients, *grads, *distance.values(), *moved, *stepped], list(distance)


def assert_same(ours, expected):
    for a, b in zip(ours[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-23, atol=0)  # blocks' values are rounded to fp32
    for a, b in zip(ours[1], expected[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert ours[2] == expected[2]


# ------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype, kept", [(F32, BF16), (BF16, F32), (F32, F16), (BF16, F64)], ids=str)
@pytest.mark.parametrize("start", [None, "state_dict"])
def test_start_points_of_another_dtype(backend, dtype, kept, start):
    model = Net().to(dtype)
    other = Net().state_dict()
    reg = L2SP(model, 0.3, start=None if start is None else other, dtype=kept)
    points = {n: (p if start is None else other[n]).detach().to(kept) for n, p in model.named_parameters()}
    assert all(torch.equal(reg.start.tensors()[name], p0) for name, p0 in points.items())
    move(model, 0.25)
    exact = 0.3 * sum(
        (p.detach().double() - points[n].double()).square().sum() for n, p in model.named_parameters()
    )
    assert_norm_close(reg.add_grad_(), exact)
    for name, p in model.named_parameters():
        assert p.grad.dtype == dtype
        assert_norm_close(p.grad, 0.6 * (p.detach().double() - points[name].double()))


# ------------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    "sizes, limit, runs",
    [
        ([1, 1, 1], 3, [(0, 3)]),
        ([1, 1, 1], 2, [(0, 2), (2, 3)]),
        ([5, 1, 1, 5], 2, [(0, 1), (1, 3), (3, 4)]),
        ([0, 0, 9, 0, 0], 4, [(0, 2), (2, 3), (3, 5)]),
        ([3], 1, [(0, 1)]),
        ([0, 0], 1, [(0, 2)]),
    ],
)
def test_runs(sizes, limit, runs):
    assert [(run.start, run.stop) for run in l2sp_stream.runs_within(sizes, limit)] == runs


class Diary(l2sp_stream.Lane):
    """A lane that notes what is asked of it, and spoils a buffer as soon as it may be filled again."""

    notes: list

    def __init__(self, device, nbytes):
        super().__init__(device, nbytes)
        self.notes.append(("buffers", nbytes))
        self.begun = set()

    def fill(self, turn, tensors):
        assert turn not in self.begun, "filled while in use"
        self.buffers[turn].fill_(255)
        self.notes.append(("fill", turn))
        return super().fill(turn, tensors)

    def begin(self, turn):
        self.begun.add(turn)

    def end(self, turn):
        self.begun.discard(turn)
        self.notes.append(("end", turn))
        self.buffers[turn].fill_(255)  # NaN in every floating dtype

    def close(self):
        self.notes.append(("close", None))


@contextmanager
def everything_away(limit=1024):
    """As if the parameters were on another device than their start points and importances."""
    with pytest.MonkeyPatch.context() as patch:
        Diary.notes = []
        patch.setattr(l2sp_stream, "BLOCK_BYTES", limit)
        patch.setattr(l2sp_stream, "is_away", lambda t, device: True)
        patch.setattr(l2sp_stream, "lane_to", Diary)
        real = L2SP._selection
        patch.setattr(L2SP, "_selection", lambda self, wanted: real(self, wanted)._replace(away=True))
        yield Diary.notes


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "new head", "tied", "frozen", "new only"])
def test_in_blocks_as_at_once(backend, kind, weighed):
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 7), nn.Linear(7, 3))
    options = {"start": copy.deepcopy(model).bfloat16() if weighed else copy.deepcopy(model)}
    if kind == "new head":
        options |= {"new": "3.*", "new_strength": 0.2}
    elif kind == "tied":
        model = tied()
        options["start"] = copy.deepcopy(model)
    elif kind == "frozen":
        model[0].requires_grad_(False)
    elif kind == "new only":
        options |= {"new": "*", "new_strength": 0.2}
    if weighed and kind != "new only":
        old = [(name, p) for name, p in model.named_parameters() if kind != "new head" or name[0] != "3"]
        options["importance"] = {name: torch.rand_like(p) for name, p in old[::2]}
    reg = L2SP(model, 0.3, **options)
    move(model, 0.25)
    expected = results(model, reg)
    with everything_away() as notes:
        assert_same(results(model, reg), expected)
    fills = [note for note in notes if note[0] == "fill"]
    assert len(fills) > (10 if kind in ("plain", "new head") else 0)
    assert all(
        size <= 20 * 30 * 8 + 512 for what, size in notes if what == "buffers"
    )  # the largest, with its F


def test_order_of_a_lane(one_backend):
    """The next block is on its way while one is in use; never a third."""
    model = nn.Sequential(*(nn.Linear(16, 15, bias=False) for _ in range(4)))
    reg = L2SP(model, 1.0)
    with everything_away(limit=1024) as notes:
        reg.add_grad_()
    assert notes == [
        ("buffers", 1024),
        ("fill", 0),
        ("fill", 1),
        ("end", 0),
        ("fill", 0),
        ("end", 1),
        ("fill", 1),
        ("end", 0),
        ("end", 1),
        ("close", None),
    ]


def test_a_lane_is_closed_after_an_error_and_nothing_has_changed(one_backend):
    model = Net()
    reg = L2SP(model, 1.0)
    move(model)
    model.head.bias.grad = torch.zeros(1).expand(3)
    with everything_away(limit=1) as notes:
        with pytest.raises(ValueError, match="overlap"):
            reg.add_grad_()
        assert notes == []
        assert model.head.weight.grad is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(l2sp_stream, "l2sp_value_op", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                reg()
        assert notes[-1] == ("close", None)


def test_second_derivatives_in_blocks(one_backend):
    model = Net().double()
    reg = L2SP(model, 0.5, importance={"head.bias": torch.rand(3)})
    move(model)
    with everything_away(limit=1):
        params = list(model.parameters())
        first = torch.autograd.grad(reg(), params, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), params)
    torch.testing.assert_close(second[0], torch.ones_like(params[0]))
    torch.testing.assert_close(second[-1], reg.importance.tensors()["head.bias"].double())


class Cuda:
    """Stand-ins for torch.cuda: everything runs at once, and the order of the calls is noted."""

    def __init__(self):
        self.log = []
        cuda = self

        class Event:
            def record(self, stream):
                cuda.log.append((self, "recorded on", stream))

            def synchronize(self):
                cuda.log.append((self, "awaited by", "host"))

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_event(self, event):
                cuda.log.append((event, "awaited by", self))

            def wait_stream(self, stream):
                cuda.log.append((stream, "awaited by", self))

        self.Event, self.Stream = Event, Stream
        self.main = Stream()

    def current_stream(self, device):
        return self.main

    @contextmanager
    def stream(self, stream):
        self.log.append((stream, "entered", None))
        yield
        self.log.append((stream, "left", None))


@pytest.mark.parametrize("pinned", [False, True])
def test_streams_and_events(monkeypatch, pinned):
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    monkeypatch.setattr(l2sp_stream, "lane_to", l2sp_stream.CudaLane)
    monkeypatch.setattr(l2sp_stream, "is_away", lambda t, device: True)
    params = [torch.zeros(64) for _ in range(5)]
    start = [torch.full((64,), float(i)) for i in range(5)]
    seen = []
    for run, (points,) in l2sp_stream.blocks(params, start, limit=256):
        cuda.log.append((run.start, "used", cuda.main))
        seen.append(points[0].clone())
    assert torch.equal(torch.stack(seen), torch.stack(start))

    entered = [i for i, (_, what, _) in enumerate(cuda.log) if what == "entered"]
    left = [i for i, (_, what, _) in enumerate(cuda.log) if what == "left"]
    used = [i for i, (_, what, _) in enumerate(cuda.log) if what == "used"]
    side = cuda.log[entered[0]][0]
    for k in range(5):
        # Before a copy its stream waits for an event of the main stream, recorded after the use two blocks before.
        free, _, waiting = cuda.log[entered[k] - 1]
        recorded = max(i for i, x in enumerate(cuda.log[: entered[k]]) if x[:2] == (free, "recorded on"))
        assert waiting is side
        assert cuda.log[recorded][2] is cuda.main
        assert recorded > (used[k - 2] if k >= 2 else -1)
        # Before a use the main stream waits for the event that the copy's stream recorded last.
        filled, _, stream = cuda.log[left[k] - 1]
        assert stream is side
        assert (filled, "awaited by", cuda.main) in cuda.log[left[k] : used[k]]
        # Staging memory is written again only after the copy out of it.
        waits = [x for x in cuda.log[: entered[k]] if x[1:] == ("awaited by", "host")]
        assert len(waits) == (0 if pinned else k + 1)
        assert pinned or waits[-1][0] is filled
    assert entered[1] < used[0]  # ahead of use
    assert cuda.log[-1] == (side, "awaited by", cuda.main)


# ------------------------------------------------------------------------------------------------------ device


def test_kept_on_a_device():
    model = Net()
    reg = L2SP(model, 0.3, device="cpu", importance={"head.bias": torch.ones(3)})
    assert reg().item() == 0
    reg.to("meta")  # of which it takes no notice, or else the values were lost
    assert {t.device.type for t in reg.buffers()} == {"cpu"}
    reg.to(torch.device("meta"), torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in reg.buffers()} == {("cpu", BF16)}
    resumed = L2SP(model, 0.3, device="cpu", importance={"head.bias": torch.zeros(3)})
    resumed.load_state_dict(reg.state_dict())
    move(model)
    torch.testing.assert_close(resumed.distance(), copy.deepcopy(reg).distance())


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
        ({"device": "gpu"}, ValueError, "device must name a device, got 'gpu'"),
        ({"device": 1.5}, TypeError, "device must be a device"),
        ({"device": "meta"}, ValueError, "device must be a device that holds values, got meta"),
        ({"start": "nowhere.safetensors"}, FileNotFoundError, "start: there is no .*nowhere"),
        ({"start": "nowhere.safetensors", "dtype": BF16}, ValueError, "dtype and device"),
        ({"start": __file__}, ValueError, r"start must be \.safetensors, got"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        L2SP(Net(), 0.1, **options)


# -------------------------------------------------------------------------------------------------------- file


def saved(tmp_path, model, form, dtype=F32):
    """A checkpoint of the model's state, as a file or as two with an index."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    if form == "file":
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path / "model.safetensors"
    names = list(tensors)
    where = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in ("part0.safetensors", "part1.safetensors"):
        save_file({name: tensors[name] for name in names if where[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tmp_path if form == "directory" else tmp_path / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "form, dtype", [("file", F32), ("directory", BF16), ("index", F16), ("file", F64)], ids=str
)
def test_start_points_in_a_checkpoint(backend, tmp_path, form, dtype):
    model, pretrained = Net(classes=7), Net(classes=3)
    path = saved(tmp_path, pretrained, form, dtype)
    options = {"new_strength": 0.2, "importance": {"backbone.0.weight": torch.rand(5, 4)}}
    options["exclude"] = "backbone.1.1.bias"
    kept = L2SP(model, {"*.bias": 0.1, "*": 0.3}, start=pretrained.to(dtype), **options)
    reg = L2SP(model, {"*.bias": 0.1, "*": 0.3}, start=str(path) if form == "file" else path, **options)
    assert reg.new_names == kept.new_names == ("head.weight", "head.bias")
    ours, expected = results(model, reg), results(model, kept)
    for a, b in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # nothing is summed otherwise
    assert ours[2] == expected[2]
    with everything_away(limit=64):
        assert_same(results(model, reg), expected)


def test_tied_weights_in_a_checkpoint(tmp_path):
    model = tied()
    save_file({"1.weight": model[0].weight.detach() - 1}, tmp_path / "a.safetensors")
    assert abs(L2SP(model, 0.5, start=tmp_path)().item() - 6) <= 1e-5
    save_file({"0.weight": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"start shares no parameter.*start has 0\.weight"):
        L2SP(model, 0.5, start=tmp_path)
    save_file({"0.weight": torch.zeros(4, 3, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"start point of '0\.weight' must be .*I64"):
        L2SP(model, 0.5, start=tmp_path)


def test_odd_places_in_a_file(one_backend, tmp_path):
    """Tensors that lie at odd addresses, empty ones and scalars."""
    model = nn.ParameterDict(
        {"a": torch.ones(3), "b": torch.ones(()), "c": torch.ones(0, 2), "d": torch.ones(5, 7)}
    )
    tensors = {name: p.detach() - 1 for name, p in model.items()}
    save_file({**tensors, "z": torch.ones(3, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * 3  # the format does not ask for alignment
    (tmp_path / "a.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + content[8 + length :]
    )
    reg = L2SP(model, 0.5, start=tmp_path)
    assert reg().item() == 0.5 * 39
    with everything_away(limit=64):
        assert reg.add_grad_().item() == 0.5 * 39
    assert all((p.grad == 1).all() for p in model.values())


def test_state_of_a_checkpoints_start_points(tmp_path):
    model, pretrained = Net(), Net()
    path = saved(tmp_path, pretrained, "directory")
    reg = L2SP(model, 0.3, start=path)
    (tmp_path / "copy").mkdir()
    state = reg.state_dict()
    assert list(state) == ["start._extra_state"]
    assert state["start._extra_state"]["path"] == str(path)
    torch.save(state, tmp_path / "state.pt")
    again = L2SP(Net(), 0.3, start=saved(tmp_path / "copy", pretrained, "directory"))
    again.load_state_dict(torch.load(tmp_path / "state.pt"))  # moved files are the same files
    (tmp_path / "other").mkdir()
    other = L2SP(Net(7), 0.3, start=saved(tmp_path / "other", Net(7), "directory"))
    with pytest.raises(ValueError, match="whose tensors are not those of"):
        other.load_state_dict(state)
    for wrong in ({}, None):
        with pytest.raises(ValueError, match="no reference to a file of start points"):
            other.load_state_dict({"start._extra_state": wrong})
    reg.to(torch.float64)  # nothing to convert
    twin = pickle.loads(pickle.dumps((model, reg)))[1]
    assert torch.equal(twin(), reg())
    assert "8 start points in" in repr(reg)


def test_a_checkpoint_that_changes_or_goes(tmp_path):
    model = Net()
    path = saved(tmp_path, model, "file")
    reg = L2SP(model, 0.3, start=path)
    loss = reg()
    saved(tmp_path, nn.Sequential(Net(), Net()), "file")
    for call in (reg, reg.add_grad_, reg.distance, lambda: reg.prox_(1.0)):
        with pytest.raises(ValueError, match="has changed since this L2SP was made"):
            call()
    assert all(p.grad is None for p in model.parameters())
    loss.backward()  # of the file that it had read: save_file writes a new one
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reg()


def test_without_safetensors(tmp_path, monkeypatch):
    path = saved(tmp_path, Net(), "file")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fasttransfer\[checkpoints\]'"):
        L2SP(Net(), 0.3, start=path)


def test_compile_breaks_the_graph(one_backend, tmp_path):
    model = Net()
    reg = L2SP(model, 0.3, start=saved(tmp_path, Net(), "file"))
    expected = torch.autograd.grad(reg(), model.head.weight)[0]
    compiled = torch.compile(lambda: 2 * reg(), backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(), model.head.weight)[0], 2 * expected)
    kept = L2SP(model, 0.3, start=Net())
    with everything_away(limit=64):
        torch.compile(lambda: kept.add_grad_() * 2, backend="aot_eager")()
    exact = [0.6 * (p.detach() - kept.start.tensors()[name]) for name, p in model.named_parameters()]
    for p, g in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, g)
