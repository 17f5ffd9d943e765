"""extract_features, and the progress bar."""

from __future__ import annotations

import os
import re
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.sampler import RandomSampler, SubsetRandomSampler

from fasttransfer import extract_features
from fasttransfer.progress import progress_bar
from tests.nets import Net

X, Y = torch.randn(10, 4), torch.arange(10)


class Calls(nn.Module):
    """Counts its calls."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.calls = inner or nn.Identity(), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def loader(size=4, **options):
    return DataLoader(TensorDataset(X, Y), batch_size=size, **options)


@pytest.fixture(params=["memory", "file"])
def path(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "features"


# ------------------------------------------------------------------------------------------------- what is computed


def test_the_output_of_the_model(path):
    model = Net()
    features, labels = extract_features(model, loader(), path=path)
    torch.testing.assert_close(features, model.eval()(X).detach())
    assert torch.equal(labels, Y)
    assert not features.requires_grad


@pytest.mark.parametrize("layer", ["backbone", "backbone.1", "backbone.1.0", "head"])
def test_the_output_of_a_layer(layer, path):
    """In eval mode: not normalized by the batch."""
    model = Net()
    model(X * 2 + 1)  # statistics other than 0 and 1
    seen = {}
    hook = model.get_submodule(layer).register_forward_hook(
        lambda m, args, out: seen.update(out=out.detach())
    )
    model.eval()(X)
    hook.remove()
    features, labels = extract_features(model.train(), loader(), layer, path=path)
    torch.testing.assert_close(features, seen["out"])
    assert torch.equal(labels, Y)


def test_nothing_behind_the_layer_is_computed():
    behind = Calls()
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), behind)
    extract_features(model, loader(), "1")
    assert behind.calls == 0


def test_the_first_call_of_a_layer_counts():
    fallback = Calls()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.layer(self.layer(x))
            except Exception:  # some models fall back on something else
                return fallback(x)

    model = Twice()
    torch.testing.assert_close(extract_features(model, [X], "layer").features, model.layer(X).detach())
    assert fallback.calls == 0


@pytest.mark.parametrize("way", ["output", "layer", "error in the model", "error in the loader"])
def test_the_model_is_left_as_it_was(way):
    model = Net()
    model.backbone[1].eval()
    model.head.train(False)
    model.shared = nn.ModuleList([nn.Sequential(model.head)])  # of a module in training
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def batches():
        yield X
        if way == "error in the loader":
            raise KeyError("image 11")
        yield X if way != "error in the model" else X[:, :3]

    if way in ("output", "layer"):
        extract_features(model, batches(), "backbone" if way == "layer" else None)
    else:
        with pytest.raises((KeyError, RuntimeError)):
            extract_features(model, batches(), "backbone.1")
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model(X).requires_grad


def test_transform(path):
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3, batch_first=True))
    expected = model(X)[0][:, -1].detach()
    features = extract_features(model, loader(), "1", transform=lambda h: h[0][:, -1], path=path).features
    torch.testing.assert_close(features, expected)
    assert features.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_of_the_layer(dtype, path):
    model = Net().eval().to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = X.to(model.head.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = extract_features(model, [x[:7], x[7:]], path=path).features
        expected = model(x).detach()
    assert features.dtype == dtype
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("layer", ["1", "_orig_mod.1"])
def test_compiled_models(layer):
    """The hook does not stay behind in compiled code."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(X)
    torch.testing.assert_close(extract_features(compiled, loader(), layer).features, model[:2](X).detach())
    assert compiled.eval()(X).shape == (10, 3)


# ------------------------------------------------------------------------------------------------- forms of batches


class Keywords(nn.Module):
    def forward(self, x, scale):
        return x * scale


@pytest.mark.parametrize(
    "batch, labels",
    [
        (X, None),
        ((X,), None),
        ([X, None], None),
        ((X, Y), Y),
        ([X, Y[:, None], "a path"], Y[:, None]),
        ({"x": X, "scale": 2}, None),
        ({"x": X, "scale": 2, "labels": Y}, Y),
        (OrderedDict(label=Y, x=X, scale=torch.tensor(2)), Y),
        (({"x": X, "scale": 2}, Y), Y),
    ],
)
def test_forms(batch, labels, path):
    by_keyword = isinstance(batch, dict) or isinstance(batch[0], dict)
    model = Keywords() if by_keyword else nn.Identity()
    features, found = extract_features(model, iter([batch, batch]), path=path)
    assert torch.equal(features, torch.cat([X, X]) * (1 + by_keyword))
    assert found is None if labels is None else torch.equal(found, torch.cat([labels, labels]))


def test_inputs_are_moved():
    """To the device of the model, or to the one that is given; a model without tensors takes them as they are."""

    class Where(nn.Module):
        def forward(self, x, *, more):
            devices.append((x.device.type, more[0]["a"].device.type))
            objects.append(more[1].device)
            return torch.zeros(10, 1)

    class Graph:  # a batch of another library
        device = None

        def to(self, device):
            self.device = device.type
            return self

    batch = {"x": X, "more": [{"a": Y}, Graph()]}
    devices, objects = [], []
    model = Where()
    extract_features(model, [batch])
    extract_features(model, [batch], device="meta")
    model.register_buffer("b", torch.zeros(1, device="meta"))
    extract_features(model, [batch])
    assert devices == [("cpu", "cpu"), ("meta", "meta"), ("meta", "meta")]
    assert objects == [None, "meta", "meta"]


def test_packed_sequences():
    model = nn.GRU(1, 3, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(X[..., None], torch.arange(1, 5).repeat(3)[:10], True, False)
    features = extract_features(model, [(packed, Y)], transform=lambda out: out[1][-1]).features
    torch.testing.assert_close(features, model(packed)[1][-1].detach())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Liar(SubsetRandomSampler):
    """A sampler whose length is not that of what it gives."""

    def __init__(self, indices, length):
        super().__init__(indices)
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    "options, count",
    [
        ({}, 10),
        ({"size": 5}, 10),
        ({"drop_last": True}, 8),
        ({"sampler": SubsetRandomSampler(range(7))}, 7),
        ({"sampler": SubsetRandomSampler(range(7)), "drop_last": True}, 4),
        ({"sampler": RandomSampler(Y, replacement=True, num_samples=25)}, 25),
        ({"sampler": Liar(range(9), 5)}, 9),
        ({"sampler": Liar(range(9), 8)}, 9),
        ({"sampler": Liar(range(9), 20)}, 9),
        ({"size": None}, 40),
    ],
    ids=lambda value: str(value).partition(" object at")[0],  # the same in every process
)
def test_loaders_of_any_length(options, count, path):
    """Every row is one of the inputs, with its label: nothing uninitialised, nothing twice or lost."""
    batches = loader(**options)
    if options.get("size", 0) is None:  # samples are the batches
        batches = DataLoader(TensorDataset(X, torch.arange(40).view(10, 4)), batch_size=None)
    features, labels = extract_features(nn.Identity(), batches, path=path)
    assert len(features) == len(labels) == count
    assert features.untyped_storage().nbytes() == features.nbytes
    if options.get("size", 0) is None:
        assert torch.equal(features, X.flatten())
    else:
        assert torch.equal(features, X[labels])
    if "sampler" not in options:
        assert torch.equal(labels, torch.arange(count))


def test_loaders_without_a_length(path):
    features, labels = extract_features(nn.Identity(), DataLoader(Stream(), batch_size=3), path=path)
    assert torch.equal(features, X)
    assert torch.equal(labels, Y)


def test_empty_batches(path):
    assert torch.equal(extract_features(nn.Identity(), [X[:0], X, X[:0]], path=path).features, X)
    assert extract_features(nn.Identity(), [X[:0]], path=path).features.shape == (0, 4)


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("layer", ["0", None])
def test_one_batch_at_a_time(known, layer, path):
    """When the loader makes a batch, the one before and its features are gone."""
    alive, count = [], 0

    def watch(t):
        alive.append(weakref.ref(t))
        return t

    class Data(TensorDataset):
        def __getitems__(self, indices):
            nonlocal count
            count += 1
            assert not any(t() is not None for t in alive), "a batch is held while the next one is made"
            return watch(X[indices]), watch(Y[indices])

    batches = DataLoader(Data(X), batch_size=2, collate_fn=lambda batch: batch)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model[0].register_forward_hook(lambda m, args, out: watch(out))
    given = batches if known else iter(batches)
    _, labels = extract_features(model, given, layer, transform=lambda h: watch(h + 0), path=path)
    assert count == 5
    assert len(alive) == 20
    assert torch.equal(labels, Y)


def test_the_result_is_no_view_of_a_larger_tensor(path):
    """Picking one token of many must not keep all of them; a loader may reuse its buffers."""
    buffer = torch.zeros(2, 8)

    def batches():
        for i in range(3):
            buffer.fill_(9)[:, 0] = i
            yield buffer

    features = extract_features(nn.Identity(), batches(), transform=lambda h: h[:, 0], path=path).features
    assert features.tolist() == [0, 0, 1, 1, 2, 2]
    assert features.untyped_storage().nbytes() == 24
    assert extract_features(nn.Identity(), [buffer]).features is not buffer


# ------------------------------------------------------------------------------------------------------- path


@pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path])
def test_the_file_is_raw_rows(kind, tmp_path):
    path = tmp_path / "features"
    features = extract_features(nn.Identity(), loader(3), path=kind(path)).features
    assert torch.equal(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(10, 4), X)
    assert features.untyped_storage().filename == str(path)
    assert os.listdir(tmp_path) == ["features"]
    features[0] = 7  # a mapping of the file, not a copy of it
    assert torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)[:4].tolist() == [7, 7, 7, 7]


def test_the_file_grows_batch_by_batch(tmp_path):
    path, sizes = tmp_path / "features", []

    def batches():
        for _ in range(3):
            sizes.append(os.path.getsize(str(path) + ".partial"))
            yield torch.zeros(64, 1024)

    extract_features(nn.Identity(), batches(), path=path)
    assert sizes == [0, 64 * 4096, 2 * 64 * 4096]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, None])
def test_a_partial_file_is_removed(error, tmp_path):
    path = tmp_path / "features"
    path.write_bytes(b"older")

    def batches():
        if error is not None:
            yield X
            raise error("image 11")

    with pytest.raises(error or ValueError):
        extract_features(nn.Identity(), batches(), path=path)
    assert os.listdir(tmp_path) == ["features"]
    assert path.read_bytes() == b"older"


def test_an_older_result_survives_the_next_one(tmp_path):
    """It is mapped from a file of the same name: one that is written over would change it, a shorter one crash."""
    path = tmp_path / "features"
    older = extract_features(nn.Identity(), [X], path=path).features
    newer = extract_features(nn.Identity(), [X[:2] + 1], path=path).features
    assert torch.equal(older, X)
    assert torch.equal(newer, X[:2] + 1)


def test_a_path_that_cannot_be_written(tmp_path):
    model = Calls()
    with pytest.raises(ValueError, match="path must be a file"):
        extract_features(model, [X], path=tmp_path)
    with pytest.raises(FileNotFoundError):
        extract_features(model, [X], path=tmp_path / "no" / "features")
    with pytest.raises(ValueError, match="path must be the name of a file"):
        extract_features(model, [X], path="")
    for wrong in (3, b"features"):
        with pytest.raises(TypeError, match="path must be a string or a path, got"):
            extract_features(model, [X], path=wrong)
    assert model.calls == 0


def test_a_relative_path_is_of_the_directory_at_the_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def batches():
        yield X
        os.chdir("elsewhere")

    features, _ = extract_features(nn.Identity(), batches(), path="features")
    assert os.listdir(tmp_path / "elsewhere") == []
    again = torch.from_file(str(tmp_path / "features"), size=X.numel(), dtype=X.dtype).view(X.shape)
    assert torch.equal(features, X)
    assert torch.equal(again, X)


# ------------------------------------------------------------------------------------------------------ errors


def test_errors_before_any_work():
    model = Net()
    model.calls = Calls()
    with pytest.raises(ValueError, match=r"layer.*'backbone\.2'.*'head'"):
        extract_features(model, [X], "backbone.2")
    for arguments, options, word in [
        ((model, [X], 3), {}, "layer"),
        ((model, X), {}, "loader"),
        ((model, 3), {}, "loader"),
        ((model.forward, [X]), {}, "model"),
        ((model, [X]), {"transform": "mean"}, "transform"),
        ((model, [X]), {"progress": 1}, "progress"),
    ]:
        with pytest.raises(TypeError, match=f"{word} must be"):
            extract_features(*arguments, **options)
    assert model.training


@pytest.mark.parametrize(
    "batches, options, kind, words",
    [
        ([], {}, ValueError, "no batches"),
        ([X, X[:, :3]], {}, ValueError, r"features of batch 1.*\[10, 3\].*\[N, 4\]"),
        ([X, X.double()], {}, ValueError, r"batch 1.*float64.*float32"),
        ([(X, Y), (X, Y[:, None])], {}, ValueError, r"labels of batch 1.*\[10, 1\].*\[N\]"),
        ([(X, Y), X], {}, ValueError, "batch 1 has no labels"),
        ([X, (X, Y)], {}, ValueError, "batch 1 has labels"),
        ([(X, Y[:3])], {}, ValueError, r"first dimension.*\[10, 4\].*labels.*\[3\]"),
        ([X], {"transform": lambda h: h.mean(0)}, ValueError, r"transform.*\[4\].*inputs.*\[10, 4\]"),
        ([{"input": X}], {"transform": lambda h: h.sum()}, ValueError, r"first dimension.*\[\]"),
        ([X], {"transform": lambda h: (h, h)}, TypeError, "transform gives.*tuple"),
        ([X], {"transform": lambda h: h.to_sparse()}, TypeError, "layout"),
        ([(X, ["cat"] * 10)], {}, TypeError, "labels.*list"),
        ([(X, torch.tensor(3))], {}, TypeError, "labels.*scalar"),
        ([()], {}, TypeError, "a batch must be.*empty"),
        (["ab"], {}, TypeError, "a batch must be.*str"),
    ],
)
def test_errors(batches, options, kind, words, path):
    with pytest.raises(kind, match=re.compile(words, re.DOTALL)):
        extract_features(nn.Identity(), batches, path=path, **options)


def test_outputs_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"layer's output must be a tensor, got tuple.*transform="):
        extract_features(nn.LSTM(4, 3), [X])


def test_a_layer_that_is_not_called():
    model = Net()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not call 'unused'"):
        extract_features(model, [X], "unused")
    assert not model.unused._forward_hooks


# ------------------------------------------------------------------------------------------------- progress bar


def test_a_bar_only_where_somebody_sees_it(capsys, monkeypatch):
    extract_features(nn.Identity(), loader())
    extract_features(nn.Identity(), loader(), progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    extract_features(nn.Identity(), loader(), progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "rich", None)  # as if it were not installed
    extract_features(nn.Identity(), loader())
    assert capsys.readouterr().err == ""
    with pytest.raises(ImportError, match="pip install rich"):
        extract_features(nn.Identity(), loader(), progress=True)


def test_the_bar(capsys):
    pytest.importorskip("rich")
    extract_features(nn.Identity(), loader(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "features" in err
    assert "3/3" in err
    extract_features(nn.Identity(), (batch for batch in loader()), progress=True)
    assert "3/?" in capsys.readouterr().err


def test_a_bar_inside_another(capsys):
    pytest.importorskip("rich")
    with progress_bar(2, "outer", True) as outer:
        for _ in range(2):
            with progress_bar(None, "inner", True) as inner:
                inner.advance(3)
            outer.advance()
    err = capsys.readouterr().err
    assert "2/2" in err
    assert "inner" not in err  # a line of its own while it is open, and gone then
    with pytest.raises(RuntimeError), progress_bar(2, "outer", True):
        raise RuntimeError
    with progress_bar(1, "next", True) as bar:
        bar.advance()
    assert "next" in capsys.readouterr().err
