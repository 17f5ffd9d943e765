"""Columns of the logits over the ranks of a process group: real processes, against the unsharded loss.

One set of processes per number of ranks runs all cases of tests/sharded_worker.py; here each is a test of its own.
"""

from __future__ import annotations

import json

import pytest
import torch

from fasttransfer import KDLoss, kd_loss

dist = torch.distributed
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from tests import sharded_worker  # noqa: E402


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def outcome(request, tmp_path_factory):
    """What each rank says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(sharded_worker.run, (request.param, str(folder)), request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", sharded_worker.CASES)
def test_ranks(outcome, case):
    failures = [f"rank {i}: {said[case]}" for i, said in enumerate(outcome) if said.get(case)]
    assert not failures, "\n".join(failures)
    if any(case not in said for said in outcome):
        pytest.skip("not run: a case before it failed")


def test_group_that_is_none():
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got int"):
        kd_loss(torch.zeros(2, 5), torch.zeros(2, 5), group=0)
    with pytest.raises(TypeError, match="group must be"):
        KDLoss(group="tp")
    with pytest.raises(ValueError, match="this rank is not in"):
        KDLoss(group=dist.GroupMember.NON_GROUP_MEMBER)


def test_distributed_that_is_not_initialized(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    group = dist.ProcessGroup(store, 0, 1)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        kd_loss(torch.zeros(2, 5), torch.zeros(2, 5), group=group)
