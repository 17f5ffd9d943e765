"""Blending checkpoints on disk: the numbers, the files, what matches, maps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="checkpoints are safetensors files")

from safetensors import safe_open
from safetensors.torch import load_file, save_model

from fasttransfer import LinearMap, blend, blend_many, use_backend
from fasttransfer import checkpoint_stream as streams
from fasttransfer.checkpoint_files import lay_out
from fasttransfer.checkpoints import blend_checkpoints
from tests import oracle
from tests.small_checkpoints import assert_same, load_folder, save, save_pair, shard, tensors


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


@pytest.fixture(params=[0, 64])
def many_pieces(request, monkeypatch):
    """Once in the usual pieces, once in pieces of 64 bytes."""
    if request.param:
        monkeypatch.setattr(streams, "PIECE_BYTES", request.param)
        monkeypatch.setattr(streams, "_LEAST_PIECE", request.param)


# ---------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("alpha", [0.7, 0.2, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_as_blend_of_the_state_dicts(pair, tmp_path, kernels, many_pieces, alpha):
    a, b, target, source = pair
    with use_backend(kernels):
        done = blend_checkpoints(target, source, alpha, tmp_path / "out")
        assert_same(load_file(tmp_path / "out" / "a.safetensors"), blend(a, b, alpha))
    assert done.counts == {"blended": 7, "integer": 2}
    assert done.nbytes == (tmp_path / "out" / "a.safetensors").stat().st_size


def test_several_sources(pair, tmp_path, many_pieces):
    a, b, target, source = pair
    c = {name: t.to(torch.float16) if t.is_floating_point() else t for name, t in tensors(3).items()}
    third = save(tmp_path / "c.safetensors", c)
    weights = [0.25, 0.75]
    blend_checkpoints(target, [source, third], {"layers.*": 0.1, "*": 0.6}, tmp_path / "out", weights=weights)
    out = load_file(tmp_path / "out" / "a.safetensors")
    expected = blend_many(a, [b, c], {"layers.*": 0.1, "*": 0.6}, weights=weights)
    assert_same(
        {n: t for n, t in out.items() if not t.is_floating_point()}, {n: a[n] for n in ("steps", "mask")}
    )
    for name, t in out.items():
        if t.is_floating_point():
            alpha = 0.1 if name.startswith("layers") else 0.6
            oracle.assert_one_rounding(t, *oracle.blend(a[name], [b[name], c[name]], alpha, None, weights))
            torch.testing.assert_close(t, expected[name])


@pytest.mark.parametrize("dtype", ["float32", torch.float64, "bfloat16", "float16"])
def test_output_dtype(pair, tmp_path, many_pieces, dtype):
    """One rounding, from the sum to the dtype that is asked for, not by way of the target's."""
    a, b, target, source = pair
    blend_checkpoints(target, source, 0.3, tmp_path / "out.safetensors", dtype=dtype)
    out = load_file(tmp_path / "out.safetensors")
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    for name, t in out.items():
        if a[name].is_floating_point():
            assert t.dtype == wanted
            operands = a[name].double(), b[name].double()
            exact = 0.3 * operands[0] + 0.7 * operands[1]
            oracle.assert_one_rounding(t, exact, 2e-7 * sum(x.abs() for x in operands))
        else:
            assert torch.equal(t, a[name])


def test_a_coefficient_of_zero_is_not_read(tmp_path):
    target = save(tmp_path / "a.safetensors", {"x": torch.tensor([1.0, 2.0])})
    source = save(tmp_path / "b.safetensors", {"x": torch.tensor([torch.nan, torch.inf])})
    blend_checkpoints(target, source, 1, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["x"].tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------------ the files


def test_header_and_metadata(pair, tmp_path):
    *_, target, source = pair
    blend_checkpoints(target, source, 0.5, tmp_path / "out.safetensors", dtype="bfloat16")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "of": "a"}
    data = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    fields = json.loads(data[8 : 8 + length])
    assert list(fields)[:2] == ["__metadata__", "steps"]  # the widest first: everything is aligned
    ends = [fields[name]["data_offsets"] for name in fields if name != "__metadata__"]
    assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]


def test_layout_is_read_by_the_real_loader(tmp_path):
    begin, starts = lay_out([("ü", "U8", (3,)), ('"\n', "F64", (1, 2)), ("z", "BF16", ())], None)
    (tmp_path / "x.safetensors").write_bytes(begin + b"\0" * 21)
    assert {n: list(t.shape) for n, t in load_file(tmp_path / "x.safetensors").items()} == {
        "ü": [3],
        '"\n': [1, 2],
        "z": [],
    }
    assert [at - len(begin) for _, at in starts] == [0, 16, 18]


def test_sharded_and_not(pair, tmp_path, many_pieces):
    a, b, whole, source = pair
    folder = shard(tmp_path / "sharded", a)
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", ".hidden"):
        (folder / name).write_text(name)
    (folder / "runs").mkdir()
    expected = blend(a, b, 0.7)

    done = blend_checkpoints(folder, source, 0.7, tmp_path / "one" / "out")
    out = tmp_path / "one" / "out"
    assert_same(load_folder(out), expected)
    assert done.files == ["README.md", "config.json", "tokenizer.json"]
    shards = [f.name for f in folder.glob("model-*")]
    assert sorted(f.name for f in out.iterdir()) == sorted(
        [*shards, *done.files, "model.safetensors.index.json"]
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = sum(t.nbytes for t in a.values())
    assert index["metadata"] == {"total_size": sizes, "note": "kept"}
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert not list((tmp_path / "one").glob("*.partial"))

    blend_checkpoints(whole, folder / "model.safetensors.index.json", 0.7, tmp_path / "two.safetensors")
    assert_same(load_file(tmp_path / "two.safetensors"), blend(a, a, 0.7))


def test_an_empty_output_directory_and_one_file_in_a_directory(pair, tmp_path):
    a, b, target, source = pair
    (tmp_path / "model").mkdir()
    shutil.copy(target, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    done = blend_checkpoints(tmp_path / "model", source, 0.7, tmp_path / "out")
    assert sorted(f.name for f in done.output.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_folder(done.output), blend(a, b, 0.7))


# --------------------------------------------------------------------------------------------------- what matches


def refused(target, source, *parts, alpha=0.5, error=ValueError, **options):
    folder = Path(target).parent
    with pytest.raises(error) as raised:
        blend_checkpoints(target, source, alpha, folder / "refused", **options)
    for part in parts:
        assert part in str(raised.value)
    assert not list(folder.glob("refused*"))


def test_all_that_does_not_match_is_named(pair, tmp_path):
    *_, target, _ = pair
    other = tensors(2, extra=torch.ones(1), steps=torch.ones(2))
    other["layers.0.weight"] = torch.randn(40, 31)
    del other["layers.1.bias"]
    source = save(tmp_path / "other.safetensors", other)
    refused(
        target,
        source,
        "4 problems",
        "layers.0.weight: target is F32 [40, 30], source is F32 [40, 31]",
        "layers.1.bias: not in source",
        "extra: in source, not in target",
        "steps: target is I64 [2], source is F32 [2]",
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_unsupported_dtypes(tmp_path, dtype):
    plain = save(tmp_path / "a.safetensors", {"x": torch.ones(4)})
    other = save(tmp_path / "b.safetensors", {"x": torch.ones(4).to(dtype)})
    refused(other, plain, "x: ", "is not supported (blended: F64, F32, BF16, F16")
    refused(plain, other, "x: source is ", "is not supported")


def test_arguments(pair, tmp_path):
    *_, target, source = pair
    refused(target, source, "alpha", alpha=float("nan"))
    refused(target, source, "alpha: 'no.*' matches none", alpha={"no.*": 1, "*": 0})
    refused(target, source, "norm.scale: no alpha", alpha={"layers.*": 1})
    refused(target, source, "weights must sum to 1", weights=[0.4])
    refused(target, [source, source], "one number per source (2)", weights=[1])
    refused(target, [], "at least one")
    refused(
        target, source, "dtype must be one of float64, float32, bfloat16, float16, got int8", dtype="int8"
    )
    refused(target, source, "keep: 'no.*' matches none", keep="no.*")
    refused(target, tmp_path / "none", "source: there is no", error=FileNotFoundError)
    refused(target, tmp_path, "must hold one", "a.safetensors, b.safetensors")
    refused(target, [source] * 3, "map must be one", map=[None, None])


def test_files_that_are_no_checkpoints(pair, tmp_path):
    *_, target, source = pair
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(source.read_bytes()[:-1])
    refused(target, cut, "cut.safetensors is not a sound safetensors file")
    cut.write_bytes(b"")
    refused(target, cut, "cut.safetensors is not a sound safetensors file")
    (tmp_path / "x.bin").write_bytes(b"")
    refused(target, tmp_path / "x.bin", "must be .safetensors")
    folder = shard(tmp_path / "sharded", tensors(1))
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    with pytest.raises(ValueError, match="output must be a directory"):
        blend_checkpoints(folder, source, 0.5, tmp_path / "refused.safetensors")
    wrong = dict(fields["weight_map"], steps="model-00001-of-00003.safetensors")
    index.write_text(json.dumps({"weight_map": wrong}))
    refused(target, folder, "does not fit its files", "steps")
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    refused(target, folder, "must name files beside it")
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    refused(target, folder, "gone.safetensors, which is not there", error=FileNotFoundError)
    index.write_text("[]")
    refused(target, folder, "is not an index")


def test_keep(tmp_path):
    target = save(tmp_path / "a.safetensors", {"body": torch.ones(4), "head.w": torch.ones(10, 4)})
    source = save(
        tmp_path / "b.safetensors",
        {"body": torch.zeros(4), "head.w": torch.ones(9, 4), "head.b": torch.ones(9)},
    )
    refused(target, source, "head.w", "head.b")
    done = blend_checkpoints(target, source, 0.25, tmp_path / "out.safetensors", keep="head.*")
    assert done.counts == {"blended": 1, "kept": 1}
    out = load_file(tmp_path / "out.safetensors")
    assert_same(out, {"body": torch.full((4,), 0.25), "head.w": torch.ones(10, 4)})


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors(tmp_path):
    a, b = Tied(), Tied()
    save_model(a, tmp_path / "a.safetensors")  # one of the two names, and in the metadata the other one
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        (stored,) = opened.keys()
        (dropped,) = opened.metadata()
    expected = blend(a.embed.weight.detach(), b.embed.weight.detach(), 0.7)

    def check(source):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        blend_checkpoints(tmp_path / "a.safetensors", source, {dropped: 0.7}, tmp_path / "out")
        (name, value), *more = load_file(tmp_path / "out" / "a.safetensors").items()
        assert (name, more) == (stored, [])
        torch.testing.assert_close(value, expected)  # blend of one tensor may be torch's lerp, to a rounding
        with safe_open(tmp_path / "out" / "a.safetensors", framework="pt") as opened:
            assert opened.metadata() == {dropped: stored}

    weight = b.embed.weight.detach()
    save_model(b, tmp_path / "b.safetensors")
    check(tmp_path / "b.safetensors")
    check(save(tmp_path / "other_name.safetensors", {dropped: weight}))
    check(save(tmp_path / "both.safetensors", {dropped: weight.clone(), stored: weight.clone()}))
    untied = save(tmp_path / "untied.safetensors", {dropped: weight + 1, stored: weight})
    refused(tmp_path / "a.safetensors", untied, f"{dropped}: the target ties it to {stored!r}")


# ---------------------------------------------------------------------------------------------------------- maps


def test_names(pair, tmp_path):
    a, b, target, _ = pair
    names = {"layers.0.weight": "enc/0/w", "layers.1.weight": "enc/1/w", "embed.weight": "wte"}
    source = save(tmp_path / "c.safetensors", {names.get(n, n): t for n, t in b.items()})
    refused(target, source, "embed.weight: not in source", "wte: in source, not in target")
    rules = {"embed.weight": "wte", "layers.*.weight": "enc/*/w"}
    (tmp_path / "names.json").write_text(json.dumps(rules))
    for i, given in enumerate((rules, tmp_path / "names.json", [str(tmp_path / "names.json")])):
        blend_checkpoints(target, source, 0.7, tmp_path / f"out{i}.safetensors", map=given)
        assert_same(load_file(tmp_path / f"out{i}.safetensors"), blend(a, b, 0.7))
    refused(target, source, "map: 'encoder.*' matches none", map={"encoder.*": "enc/*"})
    refused(target, source, "where the map looks for 'wt'", map={**rules, "embed.weight": "wt"})
    refused(target, source, "as many * as the pattern (1)", map={"layers.*": "*.*"})


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_maps(tmp_path, many_pieces, source_dtype):
    """A W B^T of matrices and kernels, A v + bias of vectors."""
    a = {
        "w": torch.randn(6, 4),
        "b": torch.randn(6),
        "k": torch.randn(6, 4, 3, 3),
        "v": torch.randn(4).bfloat16(),
    }
    b = {"w": torch.randn(5, 3), "b": torch.randn(5), "k": torch.randn(5, 3, 3, 3), "v": torch.randn(3)}
    b = {name: t.to(source_dtype) for name, t in b.items()}
    target, source = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    rows, columns = LinearMap(5, 6), LinearMap(3, 4, bias=False)
    (tmp_path / "maps").mkdir()
    save(tmp_path / "maps" / "rows.safetensors", rows.state_dict())
    save(tmp_path / "maps" / "columns.safetensors", columns.state_dict())
    both = {"rows": "rows.safetensors", "columns": "columns.safetensors"}
    saved = {"w": both, "k": both, "b": {"rows": "rows.safetensors"}, "v": "columns.safetensors"}
    (tmp_path / "maps" / "map.json").write_text(json.dumps(saved))
    sides = {"rows": rows, "columns": columns}
    passed = {"w": sides, "k": sides, "b": {"rows": rows}, "v": columns.weight.detach()}

    left, right = rows.weight.detach().double(), columns.weight.detach().double()
    mapped = {
        "w": left @ b["w"].double() @ right.T,
        "b": left @ b["b"].double() + rows.bias.detach().double(),
        "k": torch.einsum("op,pqhw,iq->oihw", left, b["k"].double(), right),
        "v": right @ b["v"].double(),
    }
    for i, given in enumerate((tmp_path / "maps" / "map.json", passed)):
        blend_checkpoints(target, source, 0.3, tmp_path / f"out{i}.safetensors", map=given)
        for name, t in load_file(tmp_path / f"out{i}.safetensors").items():
            exact = 0.3 * a[name].double() + 0.7 * mapped[name]
            assert t.dtype == a[name].dtype
            tolerance = 4e-3 if t.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(t.double(), exact, rtol=tolerance, atol=tolerance)

    wrong = {**passed, "w": {"rows": columns, "columns": columns}}
    refused(target, source, "w: source is ", "LinearMap maps 3 -> 4, its dimension 0 is 5", map=wrong)
    refused(
        target,
        source,
        "w: target is F32 [6, 4], source is",
        "mapped to [6, 3]",
        map={**passed, "w": {"rows": rows}},
    )
    refused(target, source, "both given for a vector", map={**passed, "b": {"rows": rows, "columns": rows}})
    refused(target, source, "must have some of name, rows, columns", map={**passed, "w": {"left": rows}})
    refused(target, source, "must be a saved LinearMap", map={**passed, "w": 3}, error=TypeError)
    refused(target, source, "must have a weight", map={**passed, "w": str(target)})
    refused(target, source, "there is no", map={**passed, "w": "gone.safetensors"}, error=FileNotFoundError)
