"""examples/torchrun_distillation.py under torchrun, with 2 ranks: FSDP2 and tensor parallelism, beside one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

dist = torch.distributed
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from examples import torchrun_distillation as example  # noqa: E402

ROOT = Path(__file__).parent.parent
COMMAND = "torchrun --nproc-per-node 2 -m examples.torchrun_distillation --tp 1 2 --check"


def test_two_ranks_give_the_losses_of_one_process():
    assert COMMAND in (ROOT / "docs" / "integrations.md").read_text()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, *COMMAND.split()[1:], "--steps", "3"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    alone = example.train(None, torch.device("cpu"), example.Options(steps=3))
    assert len(set(alone)) == 4
    parts = re.split(r"2 ranks on cpu: (\d) for rows \(dp\), (\d) for columns \(tp\)\n", done.stdout)[1:]
    assert [parts[i : i + 2] for i in range(0, len(parts), 3)] == [["2", "1"], ["1", "2"]]
    for printed in parts[2::3]:
        losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", printed)]
        assert losses == pytest.approx(alone, rel=1e-5)


def test_check_notices():
    assert example.report([1.0, 2.0], [1.0, 2.0001], lambda _: None)[1] > example.TOLERANCE
    said = []
    example.report([1.0, 2.0, 3.0], None, said.append)
    assert [line.split() for line in said][-1] == ["average", "loss", "3.0000000"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ranks", "2", "--tp", "3"], "--tp 3 must divide the number of ranks, 2"),
        (["--ranks", "4", "--tp", "4"], "those of attention heads"),
        (["--ranks", "16", "--tp", "1"], "16 ranks for rows: a batch has 8"),
        (["--steps", "0"], "must be at least 1"),
        (["--check"], "compares several ranks"),
    ],
)
def test_bad_arguments(arguments, words, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert words in " ".join(capsys.readouterr().err.split())
