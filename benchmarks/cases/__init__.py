"""Every case that is measured anywhere here, in one list: the suite, the quick forms and the demo select by tag.

To add a case, add a line to the list in `kd.py`, `l2sp.py` or `blend.py`.
"""

from __future__ import annotations

from benchmarks.cases import blend, kd, l2sp
from benchmarks.cases.common import COMPILED, NAIVE, OURS, REFERENCE, Spec

__all__ = ["COMPILED", "NAIVE", "OURS", "REFERENCE", "TAGS", "Spec", "everything", "select"]

TAGS = {
    "full": "everything: under 20 minutes on two cores",
    "quick": "the main sizes without torch.compile: under 3 minutes",
    "smoke": "one of each kind, few rounds, for CI: about a minute",
    "demo": "the speed table of the demo and of the README",
}


def everything() -> list[Spec]:
    """All cases in the order of the report."""
    return kd.specs() + l2sp.specs() + blend.specs()


def select(tag: str, operation: str | None = None) -> list[Spec]:
    """The cases of that tag, of one operation or of all."""
    if tag not in TAGS:
        raise ValueError(f"the tags are {', '.join(TAGS)}, got {tag!r}")
    chosen = [spec for spec in everything() if tag == "full" or tag in spec.tags]
    return [spec for spec in chosen if operation in (None, spec.operation)]
