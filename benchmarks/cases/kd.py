"""The cases of distillation: rows x vocabulary, two dtypes, with and without backward and labels.

The tensors are in kd_problem.py, the builders that only kd has in kd_builders.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.cases.common import DTYPES, Spec, make
from benchmarks.cases.kd_builders import new_and_given, variants
from benchmarks.cases.kd_divergences import divergence_specs
from benchmarks.cases.kd_linear import linear_specs
from benchmarks.cases.kd_problem import Problem
from benchmarks.cases.kd_topk import topk_specs
from benchmarks.timing import Case
from fasttransfer import simd_levels


def title_of(
    rows: int, vocab: int, dtype: str = "fp32", labelled: bool = False, backward: bool = True
) -> str:
    """`kd + labels 256x32000 bf16`, as it stands in the tables; fp32 and forward + backward go without saying."""
    words = [
        "kd",
        "+ labels" * labelled,
        "forward" * (not backward),
        f"{rows}x{vocab}",
        dtype.replace("fp32", ""),
    ]
    return " ".join(word for word in words if word)


def plain(
    rows: int, vocab: int, dtype: str, tags: str = "", *, labelled: bool = False, backward: bool = True
) -> Spec:
    """One size in one dtype, everybody in it."""
    group = "forward" if not backward else "labels" if labelled else "forward+backward"
    title = title_of(rows, vocab, dtype, labelled, backward)
    problem = partial(Problem, rows, vocab, dtype, labelled, backward)
    return make(
        "kd", title, problem, Problem.everybody, tags,
        group=group, dtype=dtype, rows=rows, vocab=vocab, labels=labelled, backward=backward,
    )  # fmt: skip


def special(
    rows: int,
    vocab: int,
    dtype: str,
    what: str,
    group: str,
    builder: Callable[[Problem, Spec, frozenset[str]], Case],
    tags: str = "",
) -> Spec:
    """One size in one dtype, in a table of its own: `what` stands behind the size."""
    title = f"{title_of(rows, vocab, dtype)}, {what}"
    problem = partial(Problem, rows, vocab, dtype)
    return make("kd", title, problem, builder, tags, group=group, dtype=dtype, rows=rows, vocab=vocab)


def plain_specs() -> list[Spec]:
    """Rows x vocabulary in both dtypes."""
    both = ("fp32", "bf16")
    specs = [
        plain(256, 32000, "fp32", "compile demo quick smoke"),
        plain(64, 128256, "fp32", "compile demo quick"),
        plain(1024, 1000, "fp32", "compile demo quick smoke"),
        plain(64, 1000, "fp32", "quick"),
        plain(8, 10, "fp32", "demo quick smoke"),
        plain(32, 262144, "fp32"),
        plain(256, 32000, "bf16", "compile demo quick smoke"),
        plain(64, 128256, "bf16", "compile demo quick"),
        plain(1024, 1000, "bf16", "compile demo quick"),
        plain(64, 1000, "bf16"),
        plain(8, 10, "bf16", "quick"),
        plain(32, 262144, "bf16"),
    ]
    specs += [
        plain(
            256,
            32000,
            dtype,
            "compile demo quick smoke" if dtype == "fp32" else "compile quick",
            labelled=True,
        )
        for dtype in both
    ]
    specs += [
        plain(rows, vocab, dtype, "compile", labelled=True)
        for rows, vocab in ((64, 128256), (1024, 1000))
        for dtype in both
    ]
    specs += [plain(8, 10, dtype, "demo quick" if dtype == "fp32" else "", labelled=True) for dtype in both]
    for dtype in both:
        specs += [
            plain(256, 32000, dtype, "quick smoke" if dtype == "fp32" else "quick", backward=False),
            plain(64, 128256, dtype, backward=False),
            plain(1024, 1000, dtype, backward=False),
            plain(64, 1000, dtype, backward=False),
            plain(8, 10, dtype, "quick" if dtype == "fp32" else "", backward=False),
            plain(32, 262144, dtype, backward=False),
            plain(256, 32000, dtype, labelled=True, backward=False),
        ]
    return specs


def specs() -> list[Spec]:
    """All cases of kd."""
    listed = plain_specs()
    known = {spec.key for spec in listed}
    # Rows at a fixed vocabulary, for the line; vocabularies with outputs of one size, just below and above 32 MiB.
    scans = [(rows, 32000) for rows in (8, 32, 64, 128, 192)] + [(rows, 1000) for rows in (1, 4, 16, 256)]
    scans += [
        (8128, 1000),
        (2032, 4000),
        (508, 16000),
        (254, 32000),
        (127, 64000),
        (31, 262144),
        (263, 32000),
    ]
    for rows, vocab in scans:
        tags = "quick" if (rows, vocab) in ((8, 32000), (64, 32000), (254, 32000), (31, 262144)) else ""
        spec = plain(rows, vocab, "fp32", tags)
        if spec.key not in known:
            listed.append(replace(spec, about=spec.about | {"group": "scan"}))
    return [*listed, *special_specs(), *divergence_specs(), *topk_specs(), *linear_specs()]


def special_specs() -> list[Spec]:
    """New and given memory, threads, SIMD levels, variants."""
    memory, cliff = "new and given memory", "cliff"
    listed = [special(4096, 32000, dtype, memory, cliff, new_and_given) for dtype in DTYPES]
    listed.append(special(256, 32000, "fp32", memory, cliff, new_and_given, "quick"))
    listed += [
        special(256, 32000, "fp32", "threads", "threads", Problem.by_threads, "quick"),
        special(64, 128256, "fp32", "threads", "threads", Problem.by_threads),
        special(1024, 1000, "fp32", "threads", "threads", Problem.by_threads),
        special(256, 32000, "bf16", "threads", "threads", Problem.by_threads),
    ]
    if simd_levels():
        listed += [
            special(256, 32000, "fp32", "SIMD levels", "simd", Problem.by_level, "quick smoke"),
            special(256, 32000, "bf16", "SIMD levels", "simd", Problem.by_level),
        ]
    listed += [
        special(256, 32000, "fp32", "variants", "variants", variants, "demo quick"),
        special(64, 128256, "fp32", "variants", "variants", variants),
    ]
    return listed
