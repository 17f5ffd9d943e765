"""Blending checkpoints on disk against `cat` and `cp`, its memory, and kill -9: python -m benchmarks.checkpoints

    python -m benchmarks.checkpoints [--gb 2] [--rounds 5] [--kills 20] [--folder DIR] [--json RESULT.json]

Pairs of checkpoints with the shapes of a Llama are made, in bf16 and in fp32. Then, interleaved and with warm inputs:

- floor: `cat` of both inputs to /dev/null, `cp` of one, `sync` of the copy
- blend: `blend_checkpoints` in a process that has imported it, output on disk; and the whole command, from the shell

Anonymous memory is RssAnon, polled from outside, above what it was after the imports. A kill comes at a random moment
of the blend; then the same command runs to its end, and the result is compared with an uninterrupted one's.
Needs Linux and five times the size of a checkpoint on disk.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import OtherLoad, environment
from fasttransfer.__main__ import main as fasttransfer_main

ALPHA = "0.7"
_CHILD = """
import resource, sys, time
from fasttransfer.checkpoints import blend_checkpoints
print("ready", flush=True)
for line in sys.stdin:
    target, source, output = line.split()
    begin = time.perf_counter()
    blend_checkpoints(target, source, float(sys.argv[1]), output)
    print(time.perf_counter() - begin, flush=True)
"""


def shapes(nbytes: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """A Llama of hidden size 2048 (TinyLlama's) with as many layers as make the size."""
    hidden, inner, vocabulary, kv = 2048, 5632, 32000, 256
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    ends = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    size = [sum(torch.Size(s).numel() * itemsize for s in part.values()) for part in (ends, layer)]
    count = max(1, round((nbytes - size[0]) / size[1]))
    layers = {f"model.layers.{i}.{name}": s for i in range(count) for name, s in layer.items()}
    return {**ends, **layers}


def make_pair(folder: Path, dtype: torch.dtype, nbytes: int) -> tuple[Path, Path]:
    """Two checkpoints; their values repeat after 16M elements, from another place in each tensor."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    pair = folder / "target.safetensors", folder / "source.safetensors"
    for path in pair:
        values = torch.randn(1 << 24).mul_(0.02).to(dtype)
        tensors = {}
        for i, (name, shape) in enumerate(shapes(nbytes, dtype.itemsize).items()):
            count = torch.Size(shape).numel()
            rolled = values.roll(-7919 * i)
            tensors[name] = rolled.repeat(-(-count // len(values)))[:count].reshape(shape).clone()
        save_file(tensors, path, metadata={"format": "pt"})
    return pair


def command(pair: tuple[Path, Path], output: Path) -> list[str]:
    """The shell command."""
    paths = ["--target", str(pair[0]), "--source", str(pair[1]), "-o", str(output)]
    return [sys.executable, "-m", "fasttransfer", "blend", *paths, "--alpha", ALPHA, "--quiet"]


def remove(*paths: Path) -> None:
    """Files and folders, and what is still on its way to the disk, out of the way of the next measurement."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()


def floor(pair: tuple[Path, Path], copy: Path) -> float:
    """Seconds that cat and cp take."""
    script = f"cat '{pair[0]}' >/dev/null; cat '{pair[1]}' >/dev/null; cp '{pair[0]}' '{copy}'; sync '{copy}'"
    begin = time.perf_counter()
    subprocess.run(["sh", "-ec", script], check=True)
    return time.perf_counter() - begin


class Child:
    """A process that has imported everything, told to blend over a pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, ALPHA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()
        self.start_up = self._anonymous()

    def blend(self, pair: tuple[Path, Path], output: Path) -> tuple[float, int]:
        """Seconds, and the most bytes of anonymous memory above start-up."""
        most, over = 0, threading.Event()

        def poll() -> None:
            nonlocal most
            while not over.wait(0.004):
                most = max(most, self._anonymous())

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pair[0]} {pair[1]} {output}\n")
        self._process.stdin.flush()
        seconds = float(self._answer())
        over.set()
        poller.join()
        return seconds, most - self.start_up

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the blending process has failed")
        return line

    def _anonymous(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
        return sum(int(line.split()[1]) << 10 for line in lines)


def measure(pair: tuple[Path, Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Times of both sides, interleaved, and memory."""
    copy, output = folder / "copy.safetensors", folder / "blended"
    times: dict[str, list[float]] = {"floor": [], "blend": [], "command": []}
    peaks, load = [], OtherLoad()
    child = Child()
    for path in pair:
        subprocess.run(["sh", "-c", f"cat '{path}' >/dev/null"], check=True)
    for i in range(rounds + 1):  # the first one is not counted
        took = {"floor": floor(pair, copy)}
        remove(copy)
        took["blend"], peak = child.blend(pair, output)
        remove(output)
        begin = time.perf_counter()
        subprocess.run(command(pair, output), check=True)
        took["command"] = time.perf_counter() - begin
        remove(output)
        if i:
            peaks.append(peak)
            for name, seconds in took.items():
                times[name].append(seconds)
            print("  " + "   ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items()), flush=True)
    child.close()
    wall, others = load.since()
    medians = {name: statistics.median(values) for name, values in times.items()}
    from safetensors import safe_open

    with safe_open(pair[0], framework="pt") as opened:
        largest = max(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return {
        "bytes": pair[0].stat().st_size,
        "times_s": times,
        "medians_s": medians,
        "blend_over_floor": medians["blend"] / medians["floor"],
        "command_over_floor": medians["command"] / medians["floor"],
        "blend_over_floor_by_round": [b / f for b, f in zip(times["blend"], times["floor"], strict=True)],
        "peak_anonymous_bytes": max(peaks),
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": int(1.5 * largest * 2),
        "busy_processors": others / wall if wall else None,
    }


def blend_in_a_fork(pair: tuple[Path, Path], output: Path) -> multiprocessing.process.BaseProcess:
    """The command in a process that has its imports behind it: all of its time is that of the blend."""
    arguments = command(pair, output)[3:]
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(fasttransfer_main(arguments))
    )
    process.start()
    return process


def survive(pair: tuple[Path, Path], folder: Path, tries: int) -> dict[str, Any]:
    """Kill it at random moments, go on, compare."""
    reference, output = folder / "reference", folder / "killed"
    blend_in_a_fork(pair, reference).join()
    written = output.with_name("killed.partial") / "files" / pair[0].name
    chance, size = random.Random(0), pair[0].stat().st_size
    identical, resumed, finished = 0, [], 0
    for _ in range(tries):
        process = blend_in_a_fork(pair, output)
        until = chance.uniform(0, size)
        while process.is_alive() and not (written.exists() and written.stat().st_size >= until):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.join()
        finished += output.exists()
        journal = output.with_name("killed.partial") / "progress.json"
        resumed.append(sum(json.loads(journal.read_text())["done"].values()) if journal.exists() else 0)
        if not output.exists() or journal.exists():
            again = blend_in_a_fork(pair, output)
            again.join()
            assert again.exitcode == 0, again.exitcode
        same = filecmp.cmp(reference / pair[0].name, output / pair[0].name, shallow=False)
        identical += same and not journal.parent.exists()
        remove(output)
    remove(reference)
    went_on = sum(n > 0 for n in resumed)
    print(f"  kill -9: {identical} of {tries} identical, {went_on} resumed, {finished} had ended", flush=True)
    return {"tries": tries, "identical": identical, "had_ended": finished, "resumed_bytes": resumed}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of a checkpoint, 1e9 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--folder", type=Path, help="where to put the files; default the system's temporary folder"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "pairs": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for dtype in (torch.bfloat16, torch.float32):
            pair = make_pair(folder, dtype, int(args.gb * 1e9))
            os.sync()
            print(f"{dtype}: two of {pair[0].stat().st_size / 1e9:.2f} GB", flush=True)
            measured = measure(pair, folder, args.rounds)
            print(
                f"  medians: blend {measured['blend_over_floor']:.2f}x of cat and cp, whole command "
                f"{measured['command_over_floor']:.2f}x; memory {measured['peak_anonymous_bytes'] / 1e6:.0f} MB of "
                f"{measured['memory_bound_bytes'] / 1e6:.0f} MB allowed",
                flush=True,
            )
            if args.kills:
                measured["kills"] = survive(pair, folder, args.kills)
            result["pairs"][str(dtype).removeprefix("torch.")] = measured
            remove(*pair)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
