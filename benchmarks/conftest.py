"""What the bench files share: `--tag`, one test per case, the environment in pytest-benchmark's JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.cases import TAGS, select
from benchmarks.machine import environment
from benchmarks.results import NOTE
from benchmarks.suite import EFFORTS, Effort

SAY = pytest.StashKey[Callable[[str], None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tag", default="quick", choices=list(TAGS), help="which cases, and how long each is measured"
    )
    parser.addoption(
        "--seconds", type=float, help="seconds of rounds per case, in place of what the tag says"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        specs = select(metafunc.config.getoption("--tag"), metafunc.module.OPERATION)
        metafunc.parametrize("spec", specs, ids=[spec.key for spec in specs])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    note = {"tag": config.getoption("--tag"), "environment": environment(), "absent": peers.absent()}
    machine_info[NOTE] = note


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    """How long a case is measured: what `--tag` says, or `--seconds`."""
    chosen, seconds = EFFORTS[request.config.getoption("--tag")], request.config.getoption("--seconds")
    return chosen if seconds is None else replace(chosen, seconds=seconds)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Where to tell what happens next: the progress display of `python -m benchmarks run`, if that runs."""
    return request.config.stash.get(SAY, lambda _: None)
