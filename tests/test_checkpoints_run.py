"""Blending checkpoints on disk: memory, interruptions, the command line."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time

import pytest
import torch

pytest.importorskip("safetensors", reason="checkpoints are safetensors files")

from safetensors.torch import load_file

from benchmarks.checkpoints import Child
from fasttransfer import blend
from fasttransfer import checkpoint_stream as streams
from fasttransfer.__main__ import main
from fasttransfer.checkpoint_output import Output
from fasttransfer.checkpoints import blend_checkpoints, plan_blend
from tests.small_checkpoints import assert_same, load_folder, save, save_pair, shard, tensors


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


# ------------------------------------------------------------------------------------------- memory, interruptions


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", {"x": torch.randn(16 << 20)})
    child = Child()
    try:
        _, peak = child.blend((tmp_path / "a.safetensors", tmp_path / "b.safetensors"), tmp_path / "out")
    finally:
        child.close()
    assert peak < 64e6  # less than one of the tensors; the bound is 1.5 * 2 of them


def test_buffers_of_small_models_are_small(pair):
    *_, target, source = pair
    plan = plan_blend(target, [source] * 3, 0.5)
    assert streams.piece_bytes(plan.files, 3) == streams._LEAST_PIECE
    job = plan.files[0].jobs[0]
    wide = job.operands[0]._replace(entry=job.operands[0].entry._replace(nbytes=2 << 20))
    big = plan.files[0]._replace(jobs=[job._replace(operands=[wide])])
    for k in (1, 3, 8):
        assert streams.piece_bytes([big], k) * streams._DEPTH * (k + 2) <= 1.5 * (2 << 20) * (k + 1)


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Small pieces, brought to the disk often; `stop_after(n)` lets the n-th one fail."""
    monkeypatch.setattr(streams, "PIECE_BYTES", 256)
    monkeypatch.setattr(streams, "_LEAST_PIECE", 256)
    monkeypatch.setattr(streams, "SYNC_BYTES", 1)
    write = streams._Sink.write

    def stop_after(n):
        count = 0

        def counted(self, data):
            nonlocal count
            count += 1
            if n is not None and count > n:
                raise Stopped
            if self._syncing is not None:
                self._syncing.result()
            write(self, data)

        monkeypatch.setattr(streams._Sink, "write", counted)

    return stop_after


@pytest.mark.parametrize("sharded", [False, True])
def test_an_interrupted_run_goes_on(pair, tmp_path, stop_after, sharded):
    a, b, target, source = pair
    target = shard(tmp_path / "sharded", a) if sharded else target
    out, work = tmp_path / "out", tmp_path / "out.partial"
    arguments = target, source, 0.7, out
    resumed = []
    for n in (1, 5, 30):
        stop_after(n)
        with pytest.raises(Stopped):
            blend_checkpoints(*arguments)
        assert not out.exists()
        resumed.append(sum(json.loads((work / "progress.json").read_text())["done"].values()))
    assert resumed[0] < resumed[1] < resumed[2]
    stop_after(None)
    done = blend_checkpoints(*arguments)
    assert done.resumed == resumed[2]
    assert not done.restarted
    assert_same(load_folder(out), blend(a, b, 0.7))
    assert not work.exists()


def test_another_blend_starts_over(pair, tmp_path, stop_after):
    a, b, target, source = pair
    stop_after(20)
    with pytest.raises(Stopped):
        blend_checkpoints(target, source, 0.7, tmp_path / "out")
    stop_after(None)
    done = blend_checkpoints(target, source, 0.6, tmp_path / "out")
    assert (done.resumed, done.restarted) == (0, True)
    assert_same(load_folder(tmp_path / "out"), blend(a, b, 0.6))


def test_killed_after_the_rename(pair, tmp_path, monkeypatch):
    a, b, target, source = pair
    for name in ("out", "out.safetensors"):
        with monkeypatch.context() as patch:
            patch.setattr(Output, "_close", lambda self: (_ for _ in ()).throw(Stopped()))
            with pytest.raises(Stopped):
                blend_checkpoints(target, source, 0.7, tmp_path / name)
        assert (tmp_path / f"{name}.partial").exists()
        blend_checkpoints(target, source, 0.7, tmp_path / name)
        assert not (tmp_path / f"{name}.partial").exists()
    assert_same(load_file(tmp_path / "out.safetensors"), blend(a, b, 0.7))
    assert_same(load_folder(tmp_path / "out"), blend(a, b, 0.7))


def test_nothing_is_overwritten(pair, tmp_path):
    *_, target, source = pair
    before = target.read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "x").write_text("x")
    for output in (target, tmp_path / "full", tmp_path / "mine", tmp_path):
        with pytest.raises(FileExistsError, match=r"exists; remove it|is in the way"):
            blend_checkpoints(target, source, 0.5, output)
    assert target.read_bytes() == before
    names = {"a.safetensors", "b.safetensors", "full", "mine.partial"}
    assert {f.name for f in tmp_path.iterdir()} == names


def test_two_runs_at_once(pair, tmp_path):
    *_, target, source = pair
    pytest.importorskip("fcntl")
    first = Output(tmp_path / "out", False, "x")
    first.open()
    with pytest.raises(BlockingIOError, match="another run"):
        blend_checkpoints(target, source, 0.5, tmp_path / "out")
    first.release()
    blend_checkpoints(target, source, 0.5, tmp_path / "out")


def test_an_input_that_changes_meanwhile(pair, tmp_path, monkeypatch):
    *_, target, source = pair
    map_pieces = streams.pieces

    def touched(*args):
        source.touch()
        return map_pieces(*args)

    monkeypatch.setattr(streams, "pieces", touched)
    with pytest.raises(OSError, match="was changed while it was read"):
        blend_checkpoints(target, source, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_slowly(arguments):
    write = streams._Sink.write

    def slowly(self, data):
        time.sleep(0.01)
        write(self, data)

    streams._Sink.write = slowly
    streams.PIECE_BYTES, streams.SYNC_BYTES = 1 << 16, 1 << 18
    main(arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork of this one")
def test_kill_9(tmp_path):
    """At random moments, again and again, until a run gets to its end."""
    torch.manual_seed(0)
    values = [{f"x.{i}": torch.randn(60, 1000 + i).bfloat16() for i in range(40)} for _ in range(2)]
    target, source = (save(tmp_path / f"{n}.safetensors", v) for n, v in zip("ab", values, strict=True))
    arguments = ["blend", "--target", str(target), "--source", str(source), "--alpha", "0.7", "-q"]
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    chance, out, journal = random.Random(0), tmp_path / "out", tmp_path / "out.partial" / "progress.json"
    before = resumed = 0
    while resumed < 5:
        process = multiprocessing.get_context("fork").Process(
            target=run_slowly, args=([*arguments, "-o", str(out)],)
        )
        process.start()
        process.join(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        if out.exists():
            break
        assert [f.name for f in tmp_path.glob("out*")] in ([], ["out.partial"])
        done = sum(json.loads(journal.read_text())["done"].values()) if journal.exists() else 0
        assert done >= before
        resumed += before > 0
        before = done
    assert resumed
    assert (out.exists() and not journal.exists()) or main([*arguments, "-o", str(out)]) == 0
    assert (out / "a.safetensors").read_bytes() == (tmp_path / "whole" / "a.safetensors").read_bytes()
    assert not journal.parent.exists()


# --------------------------------------------------------------------------------------------------- command line


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_command(pair, tmp_path, capsys):
    a, b, target, source = pair
    arguments = "blend", "--target", target, "--source", source, "--alpha", "layers.*=0.9", "--alpha", "0.5"
    status, out, err = run(capsys, *arguments, "--dry-run")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["layers.*.weight", "x2", "F32", "[40,", "30]", "alpha", "0.9", "with", "F32"] in lines
    assert ["steps", "I64", "[2]", "from", "the", "target", "(integers)"] in lines
    assert not list(tmp_path.glob("out*"))
    status, out, err = run(capsys, *arguments, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "9 tensors (7 blended, 2 integers copied)" in out
    assert_same(load_folder(tmp_path / "out"), blend(a, b, {"layers.*": 0.9, "*": 0.5}))
    status, out, err = run(capsys, *arguments, "-o", tmp_path / "out")
    assert status == 2
    assert "exists; remove it" in err


def test_command_errors(pair, tmp_path, capsys):
    *_, target, source = pair
    other = save(tmp_path / "other.safetensors", tensors(2, empty=torch.zeros(1, 3)))
    both = "empty: target is F32 [0, 3], source is F32 [1, 3]"
    for extra in (["-o", tmp_path / "out"], ["--dry-run"]):
        status, out, err = run(
            capsys, "blend", "--target", target, "--source", other, "--alpha", "0.5", *extra
        )
        assert status == 2
        assert both in err
        assert ("9 tensors" in out) == ("layers.*.weight  x2" in out) == (extra == ["--dry-run"])
        assert "empty" not in out
    for arguments, message in (
        (["--alpha", "0.5"], "-o is missing"),
        (["--alpha", "x*=y", "--dry-run"], "PATTERN=number"),
        (["--alpha", "0.5", "--dry-run", "--map", tmp_path / "none.json"], "there is no file"),
        (["--alpha", "0.5", "--dry-run", "--map", other], "is not JSON"),
        (["--alpha", "0.5", "--dry-run", "--dtype", "int8"], "dtype must be one of"),
    ):
        status, _, err = run(capsys, "blend", "--target", target, "--source", source, *arguments)
        assert (status, message in err) == (2, True), err
    assert not list(tmp_path.glob("out*"))


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert out.count("\n") <= 40
    for part in ("fasttransfer", torch.__version__, "CPU kernels", "threads", "CUDA kernels", "allocator"):
        assert part in out
    status, out, _ = run(capsys, "info", "--json")
    assert json.loads(out)["build"]["torch"] == torch.__version__
