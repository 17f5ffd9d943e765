"""The teacher's outputs on disk: what is written is what is read, an interrupted run goes on, nothing is mixed up."""

import json
import pickle
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from fasttransfer import TeacherCache, TeacherCacheWriter, kd_loss, top_k_log_probs, topk_kd_loss
from tests import oracle

pytest.importorskip("safetensors")
QUIET = {"progress": False}


def written(folder, logits, batch=7, k=5, **options):
    with TeacherCacheWriter(folder, k=k, vocab_size=logits.shape[-1], **QUIET, **options) as cache:
        for part in logits[len(cache) :].split(batch):
            cache.add(part)
    return TeacherCache(folder)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_top_k_log_probs(dtype, monkeypatch):
    logits = (3 * torch.randn(4, 5, 40)).to(dtype)
    logits[0, 0, 3:] = -torch.inf
    exact = logits.double().log_softmax(-1).topk(6)
    for chunk in (1 << 22, 80):
        monkeypatch.setattr("fasttransfer.teacher_cache._CHUNK_LOGITS", chunk)
        values, indices = top_k_log_probs(logits.transpose(0, 1), 6)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        oracle.assert_norm_close(values, exact.values.transpose(0, 1))
        picked = logits.transpose(0, 1).gather(-1, indices)
        assert torch.equal(picked, logits.transpose(0, 1).topk(6).values)
    for k in (0, 41):
        with pytest.raises(ValueError, match="k must be"):
            top_k_log_probs(logits, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "columns, index", [(100, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)]
)
def test_what_is_read_is_what_was_written(tmp_path, columns, index, dtype):
    import safetensors.torch

    logits = torch.randn(23, columns)
    logits[:, -1] += 20  # the last column is among the k
    cache = written(tmp_path, logits, shard_rows=10, dtype=dtype)
    values, indices = top_k_log_probs(logits, 5)
    values = values.to(dtype)
    assert (len(cache), cache.k, cache.vocab_size, cache.dtype) == (23, 5, columns, dtype)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [len(safetensors.torch.load_file(path)["values"]) for path in shards] == [10, 10, 3]
    assert safetensors.torch.load_file(shards[0])["indices"].dtype == index
    rows = torch.tensor([22, 0, 9, 10, 10, -1])
    for key in (
        slice(None),
        slice(8, 21),
        slice(3, 3),
        slice(20, 2),
        slice(1, 22, 4),
        rows,
        rows.tolist()[:2],
        [],
    ):
        got = cache[key]
        picked = torch.arange(23)[torch.tensor(key, dtype=torch.long) if isinstance(key, list) else key]
        assert torch.equal(got.values, values[picked])
        assert torch.equal(got.indices, indices[picked])
        assert got.indices.dtype == torch.int64
    assert torch.equal(cache[12].values, values[12])
    assert torch.equal(torch.stack([row.indices for row in cache]), indices)
    got = cache[:2]
    got.values.zero_()  # a copy, not the file
    assert torch.equal(cache[0].values, values[0])


def test_an_interrupted_writer_goes_on(tmp_path):
    logits = torch.randn(50, 30)

    def interrupted():
        with TeacherCacheWriter(tmp_path, k=5, vocab_size=30, shard_rows=8, **QUIET) as cache:
            cache.add(logits[:20])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(TeacherCache(tmp_path)) == 20  # what was computed is kept
    # A crash leaves half a file, or a whole one that nobody knows of: neither counts.
    (tmp_path / "shard-000003.partial").write_bytes(b"half")
    (tmp_path / "shard-000003.safetensors").write_bytes(b"whole")
    writer = TeacherCacheWriter(tmp_path, k=5, vocab_size=30, shard_rows=8, **QUIET)
    assert len(writer) == 20
    with writer:
        writer.add(logits[20:29])
        assert len(writer) == 29
    cache = written(tmp_path, logits)
    values, indices = top_k_log_probs(logits, 5)
    assert torch.equal(cache[:].indices, indices)
    assert torch.equal(cache[:].values, values.half())
    assert len(written(tmp_path, logits)) == 50  # complete: nothing more is written


def test_another_cache_in_the_folder_is_refused(tmp_path):
    cache = written(tmp_path, torch.randn(4, 30), fingerprint="a")
    assert cache.fingerprint == TeacherCache(tmp_path, fingerprint="a").fingerprint == "a"
    with pytest.raises(ValueError, match=r"fingerprint is 'a' .* 'b' was given"):
        TeacherCache(tmp_path, fingerprint="b")
    same = {"k": 5, "vocab_size": 30, "fingerprint": "a", **QUIET}
    for name, value, shown in (
        ("fingerprint", "b", "'b'"), ("k", 6, "6"), ("vocab_size", 31, "31"), ("dtype", torch.float32, "'float32'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is .* but {shown} was given"):
            TeacherCacheWriter(tmp_path, **(same | {name: value}))
    meta = tmp_path / "teacher_cache.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        TeacherCache(tmp_path)
    meta.unlink()
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        TeacherCache(tmp_path)
    with pytest.raises(ValueError, match="without teacher_cache"):
        TeacherCacheWriter(tmp_path, **same)


def test_files_that_do_not_fit_are_refused(tmp_path):
    cache = written(tmp_path, torch.randn(6, 30), shard_rows=3)
    (tmp_path / "shard-000001.safetensors").write_bytes(
        (written(tmp_path / "other", torch.randn(2, 30)).folder / "shard-000000.safetensors").read_bytes()
    )
    assert cache[:3].values.shape == (3, 5)
    with pytest.raises(ValueError, match=r"shard-000001.safetensors does not hold values of shape \[3, 5\]"):
        cache[4]


def test_damaged_files_are_refused(tmp_path):
    cache = written(tmp_path, torch.randn(6, 30), shard_rows=3)
    meta, shard = tmp_path / "teacher_cache.json", tmp_path / "shard-000001.safetensors"
    whole = meta.read_text()
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(
        ValueError, match=r"shard-000001.safetensors, which teacher_cache.json names, cannot be read"
    ):
        cache[4]
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        cache[4]
    meta.write_text(whole[:30])
    with pytest.raises(ValueError, match=r"teacher_cache.json is damaged: "):
        TeacherCache(tmp_path)
    meta.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k not in ("k", "shards")}))
    with pytest.raises(ValueError, match="it lacks k, shards"):
        TeacherCache(tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="at most vocab_size=30, got 31"):
        TeacherCacheWriter(tmp_path, k=31, vocab_size=30)
    with pytest.raises(ValueError, match="dtype must be float16"):
        TeacherCacheWriter(tmp_path, k=3, vocab_size=30, dtype=torch.int8)
    with pytest.raises(TypeError, match="fingerprint must be a string"):
        TeacherCacheWriter(tmp_path, k=3, vocab_size=30, fingerprint=3)
    writer = TeacherCacheWriter(tmp_path, k=3, vocab_size=30, **QUIET)
    with pytest.raises(RuntimeError, match="not open"):
        writer.add(torch.zeros(2, 30))
    with writer:
        for logits, message in (
            (torch.zeros(2, 29), "vocab_size=30"),
            (torch.zeros(2, 30).int(), "logits must be"),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                writer.add(logits)
        with pytest.raises(ValueError, match=r"\[..., 3\], got \[2, 4\]"):
            writer.add_top_k(torch.zeros(2, 4), torch.zeros(2, 4).long())
        with pytest.raises(ValueError, match=r"in \[0, 30\), got -1 to 5"):
            writer.add_top_k(torch.zeros(1, 3), torch.tensor([[-1, 5, 0]]))
        writer.add(torch.randn(2, 3, 40))  # columns beyond the vocabulary are cut off
    cache = TeacherCache(tmp_path)
    assert len(cache) == 6
    for key in (6, -7, torch.tensor([0, 6])):
        with pytest.raises(IndexError, match="is not in a cache of 6 rows"):
            cache[key]
    for key in ("0", 1.0, True, torch.tensor([0.5]), torch.tensor(1)):
        with pytest.raises(TypeError, match="rows must be"):
            cache[key]


def test_without_safetensors(tmp_path, monkeypatch):
    written(tmp_path, torch.randn(3, 30))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for make in (lambda: TeacherCache(tmp_path), lambda: TeacherCacheWriter(tmp_path, k=5, vocab_size=30)):
        with pytest.raises(ImportError, match=r"pip install fasttransfer\[cache\]"):
            make()


def test_distillation_from_a_cache(tmp_path):
    """Through a DataLoader with workers; the loss is that of the teacher itself, to the rounding of its values."""
    teacher, student = torch.randn(40, 60), torch.randn(40, 60)
    cache = written(tmp_path, teacher, k=60, shard_rows=16, dtype=torch.float32)
    assert len(pickle.loads(pickle.dumps(cache))) == 40
    values, indices = (
        torch.cat(x) for x in zip(*DataLoader(cache, batch_size=9, num_workers=1), strict=True)
    )
    for tail in ("renormalize", "zero", "bucket"):
        loss = topk_kd_loss(student, values, indices, tail=tail, teacher_form="log_probs")
        torch.testing.assert_close(loss, kd_loss(student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_log_probabilities_are_logits_of_kd_loss(temperature):
    """All of them, computed before: log-softmax shifts a row by a constant, which no softmax at any T sees."""
    student, teacher = torch.randn(6, 50, requires_grad=True), 5 * torch.randn(6, 50)
    loss = kd_loss(student, teacher, temperature=temperature)
    other = kd_loss(student, teacher.log_softmax(-1), temperature=temperature)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    for g, h in zip(torch.autograd.grad(loss, student), torch.autograd.grad(other, student), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)
