"""How much memory a call takes, as torch's allocator sees it."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler greets on stderr

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int | None:
    """The most bytes that torch held during `call` beyond what it held before; None where the profiler says nothing.

    Kernels' own scratch (per thread, in cache) is not torch's and not counted; nor is what C libraries take.
    """
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
            call()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    except (RuntimeError, AttributeError):
        return None
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
