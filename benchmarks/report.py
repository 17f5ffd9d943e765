"""A result as Markdown, fit for the summary of a CI job, and as plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, targets
from benchmarks.cases.common import COMPILED, NAIVE, OURS, REFERENCE
from benchmarks.figures import cell, duration, percent, plain, size, speedup, spread, times

Case = dict[str, Any]

# Title of a section, the groups of cases in it, a line about it.
SECTIONS = [
    ("kd: forward and backward", ("forward+backward",),
     "Roofline: `torch.add(a, b)` into new memory. Floor: read both logits, write the gradient."),
    ("kd with labels: `w CE + (1 - w) T² KL`, forward and backward", ("labels",),
     "Roofline and floor as without labels: the label term reads nothing more."),
    ("kd: forward only", ("forward",),
     "Floor: read both logits, write nothing. Roofline: `torch.add(a, b, out=o)`, the faster of the two adds."),
    ("kd by other divergences, forward and backward", ("divergence",),
     "Roofline and floor as of kd: what is read and written is the same."),
    ("kd from the teacher's k largest outputs, forward and backward", ("topk",),
     "Roofline: `torch.neg(a)` into new memory. Floor: read the student, write the gradient."),
    ("kd from hidden states and heads, forward and backward", ("linear",),
     "Roofline: the four matrix products alone, into given memory. Their operations stand in place of bytes, so GB/s "
     "are GFLOP/s. Memory: the returned gradients are in it."),
    ("L2-SP: value and gradient added to what is there", ("l2sp",),
     "Roofline: `a.lerp_(b, w)` over one flat tensor of as many numbers. Floor: read p, p0, gradient; write gradient."),
    ("Blending in place, one source", ("one",), "Roofline: `a.lerp_(b, w)` over one flat tensor of as many numbers."),
    ("Blending in place, four sources", ("many",), "Roofline as for one source. Floor: each source is read once."),
    ("Blending a bfloat16 model into a float32 average", ("mixed",), "Roofline as for one source."),
]  # fmt: skip


def write(result: dict[str, Any], directory: Path) -> list[Path]:
    """`report.md` and the plots, into a folder; their paths, the report first."""
    from benchmarks.plots import plot_cost, plot_roofline, plot_speed_kd, plot_speed_lists

    directory.mkdir(parents=True, exist_ok=True)
    drawn = [plot(result, directory) for plot in (plot_speed_kd, plot_speed_lists, plot_roofline, plot_cost)]
    plots = [path for path in drawn if path is not None]
    report = directory / "report.md"
    report.write_text(markdown(result, plots))
    return [report, *plots]


def markdown(result: dict[str, Any], plots: Sequence[Path] = ()) -> str:
    """The whole report."""
    cases = result["cases"]
    parts = [
        f"# fasttransfer: benchmark ({result['tag']})",
        figures.headline(result),
        environment(result),
        *(f"![{path.stem}]({path.name})" for path in plots),
        verdicts(result),
    ]
    parts += [section(title, plain(cases, *groups), about) for title, groups, about in SECTIONS]
    parts += [fixed_cost(cases), scan_table(cases), linear(cases), by_vocabulary(cases)]
    parts += [cliff(cases), thread_table(cases), simd_table(cases), variants(cases)]
    parts += [against_targets(cases), losses(cases), absent(result), notes(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left; nothing if there are no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    rule = "|---|" + "---:|" * (len(headers) - 1)
    return "\n".join(["| " + " | ".join(headers) + " |", rule, *lines])


def titled(title: str, body: str, about: str = "") -> str:
    """A section, or nothing if it has no body."""
    return "\n\n".join(part for part in (f"## {title}", about, body) if part) if body else ""


def environment(result: dict[str, Any]) -> str:
    """What the figures depend on."""
    env = result["environment"]
    memory = f", {env['memory_gb']:g} GB" if env.get("memory_gb") else ""
    rows = [
        ("processor", f"{env['cpu']}, {env['cores']} cores{memory}"),
        ("SIMD level", env["simd"]),
        ("threads", f"{env['threads']}"),
        ("GPU", env["gpu"]),
        ("torch, Python", f"{env['torch']}, {env.get('python', '?')}"),
        ("commit", f"{env['commit']}, measured {env.get('date', 'at an unknown time')}"),
        ("other processes", f"{env['cores_busy_with_others']:.2f} cores busy meanwhile"),
    ]
    warning = figures.busy_warning(env)
    body = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f"> **{warning}**\n\n{body}" if warning else body


def verdicts(result: dict[str, Any]) -> str:
    """Whether everybody was right."""
    providers = [p for case in result["cases"] for p in case["providers"].values()]
    wrong = [
        f"- {case['title']}, {name}: {provider['note']}"
        for case in result["cases"]
        for name, provider in case["providers"].items()
        if not provider["ok"]
    ]
    agree = f"{len(providers) - len(wrong)} of {len(providers)} results agree."
    right = f"Checked against float64 before any timing: {agree}"
    return "\n".join([right, *wrong])


def section(title: str, cases: Sequence[Case], about: str) -> str:
    """Everybody in one table."""
    headers = ["case", "naive", "compile", "best other", "pure torch", "**ours**", "±", "against naive",
               "compile", "other", "GB/s", "of roofline", "memory, naive", "ours", "error"]  # fmt: skip
    return titled(title, table(headers, [_row(case) for case in cases]), about)


def _row(case: Case) -> list[str]:
    ours = case["providers"][OURS]
    other = figures.best_other(case)
    error = ours["error"]
    return [
        case["title"], cell(case, NAIVE), cell(case, COMPILED),
        f"{cell(case, other)} ({other})" if other else "–", cell(case, REFERENCE), f"**{cell(case, OURS)}**",
        percent(spread(ours)), _ratio(speedup(case, NAIVE)), _ratio(speedup(case, COMPILED)),
        _ratio(speedup(case, other)) if other else "–",
        f"{ours['gb_per_s']:.1f}" if "of_roofline" in ours else "–", percent(ours.get("of_roofline")),
        size(case["providers"].get(NAIVE, {}).get("peak_bytes")), size(ours.get("peak_bytes")),
        f"{error:.0e}" if error is not None else "–",
    ]  # fmt: skip


def _ratio(value: float | None) -> str:
    """Marked where ours is slower."""
    return times(value) if value is None or value >= 1 - figures.TIE else f"**{times(value)}** slower"


def smallest(cases: Iterable[Case]) -> list[Case]:
    """The cases where calling is all that is measured."""
    return [case for case in plain(cases) if "8x10" in case["key"]]


def fixed_cost(cases: Sequence[Case]) -> str:
    """The cost of a call that has next to nothing to compute."""
    rows = [
        [case["title"], f"**{cell(case, OURS)}**", percent(spread(case["providers"][OURS])), cell(case, NAIVE),
         _ratio(speedup(case, NAIVE))]
        for case in smallest(cases)
    ]  # fmt: skip
    about = "80 numbers: what a call costs beside the arithmetic, backward included."
    return titled(
        "Fixed cost per call", table(["case", "**ours**", "±", "naive", "against naive"], rows), about
    )


def scan(cases: Iterable[Case], vocab: int | None = None) -> list[Case]:
    """Plain kd forward + backward in fp32 of ours, by size."""
    found = [
        c for c in plain(cases, "forward+backward", "scan")
        if c["dtype"] == "fp32" and c["about"]["vocab"] == (vocab or c["about"]["vocab"])
        and "median_s" in c["providers"][OURS]
    ]  # fmt: skip
    return sorted(found, key=lambda c: (c["about"]["vocab"], c["about"]["rows"]))


def logits_of(case: Case) -> int:
    """Logits on one side."""
    return int(case["about"]["rows"] * case["about"]["vocab"])


def scan_table(cases: Sequence[Case]) -> str:
    """Cost per logit over all sizes."""

    def per_logit(case: Case, name: str) -> str:
        value = figures.median(case, name)
        return f"{1e9 * value / logits_of(case):.3g}" if value else "–"

    rows = [
        [f"{c['about']['rows']}", f"{c['about']['vocab']}", cell(c, OURS), per_logit(c, OURS), per_logit(c, NAIVE),
         percent(c["providers"][OURS].get("of_roofline"))]
        for c in scan(cases)
    ]  # fmt: skip
    headers = ["rows", "vocabulary", "ours", "ours, ns per logit", "naive, ns per logit", "of roofline"]
    return titled("kd by size: forward and backward, fp32", table(headers, rows))


def lines_over_rows(cases: Sequence[Case]) -> list[tuple[int, list[Case], tuple[float, float, float]]]:
    """Per vocabulary with enough row counts whose output stays below 32 MiB: the cases and their line."""
    found = []
    for vocab in (32000, 1000):
        points = [c for c in scan(cases, vocab) if 4 * logits_of(c) < 32 * 2**20]
        if len(points) >= 3:
            fit = figures.linear_fit((c["about"]["rows"], c["providers"][OURS]["median_s"]) for c in points)
            found.append((vocab, points, fit))
    return found


def linear(cases: Sequence[Case]) -> str:
    """Time against rows as a straight line."""
    rows = [
        [
            f"{vocab}",
            ", ".join(str(c["about"]["rows"]) for c in points),
            signed(a),
            f"{duration(b)}",
            percent(worst),
        ]
        for vocab, points, (a, b, worst) in lines_over_rows(cases)
    ]
    about = (
        "`time = fixed + rows x per row`, fitted in relative error; worst: the largest deviation of a point."
    )
    return titled(
        "kd is linear in rows", table(["vocabulary", "rows", "fixed", "per row", "worst"], rows), about
    )


def signed(seconds: float) -> str:
    """An intercept may be negative."""
    return ("-" if seconds < 0 else "") + duration(abs(seconds))


def by_vocabulary(cases: Sequence[Case]) -> str:
    """Time per logit at the largest vocabulary against 32,000 columns, outputs of the same size."""
    known = {(c["about"]["rows"], c["about"]["vocab"]): c for c in scan(cases)}
    rows = []
    for wide, narrow, what in (
        ((31, 262144), (254, 32000), "below 32 MiB"),
        ((32, 262144), (263, 32000), "from 32 MiB on"),
    ):
        if wide in known and narrow in known:
            medians = [known[s]["providers"][OURS]["median_s"] / (s[0] * s[1]) * 1e9 for s in (wide, narrow)]
            sizes = [f"{r}x{v}" for r, v in (wide, narrow)]
            rows.append([what, *sizes, *(f"{m:.3g} ns" for m in medians), times(medians[0] / medians[1])])
    headers = ["output", "wide", "narrow", "per logit, wide", "per logit, narrow", "ratio"]
    return titled("Cost per logit at 262,144 columns against 32,000", table(headers, rows))


def cliff(cases: Sequence[Case]) -> str:
    """New memory against given memory."""
    rows = []
    for case in (c for c in cases if c["about"]["group"] == "cliff"):
        for name, provider in case["providers"].items():
            rows.append(
                [f"{case['title'].partition(',')[0]}", name, cell(case, name), percent(spread(provider)),
                 provider.get("roofline", "–"),
                 duration(case["rooflines"][provider["roofline"]]["median_s"]) if "roofline" in provider else "–",
                 percent(provider.get("of_roofline")), size(provider.get("peak_bytes"))]
            )  # fmt: skip
    headers = ["case", "who", "time", "±", "judged by", "its time", "of roofline", "memory"]
    about = (
        "Past 32 MiB the C library asks the system for an output's memory anew at each call: every provider that "
        "allocates pays for it, `torch.add` too. `inplace=True` writes into the logits, as `out=` into given memory."
    )
    return titled("New and given memory", table(headers, rows), about)


def thread_table(cases: Sequence[Case]) -> str:
    """What the second thread brings, to ours and to the roofline call."""
    rows = []
    for case in (c for c in cases if c["about"]["group"] == "threads"):
        one, two = (case["providers"].get(f"{OURS}, {n}", {}) for n in ("1 thread", "2 threads"))
        if "median_s" not in one or "median_s" not in two:
            continue
        roof_one, roof_two = case["rooflines"].values()
        own, roof = one["median_s"] / two["median_s"], roof_one["median_s"] / roof_two["median_s"]
        rows.append(
            [case["title"].partition(", threads")[0], duration(one["median_s"]), duration(two["median_s"]), times(own),
             times(roof), times(own / roof), percent(one.get("of_roofline")), percent(two.get("of_roofline"))]
        )  # fmt: skip
    headers = [
        "case",
        "1 thread",
        "2 threads",
        "speedup",
        "roofline's own",
        "ratio of the two",
        "1 thread of roofline",
        "2 threads",
    ]
    return titled("Threads", table(headers, rows), "One and two threads in the same rounds.")


def simd_table(cases: Sequence[Case]) -> str:
    """The levels in the same rounds."""
    rows = []
    for case in (c for c in cases if c["about"]["group"] == "simd"):
        levels = [name for name, p in case["providers"].items() if p["ours"]]
        best = figures.median(case, levels[0])
        for name in levels:
            own = figures.median(case, name)
            share = best / own if best and own else None
            rows.append([case["title"].partition(", SIMD")[0], name.removeprefix(f"{OURS}, "), cell(case, name),
                         percent(share), times(speedup(case, NAIVE, name))])  # fmt: skip
    return titled(
        "SIMD levels", table(["case", "level", "time", "speed of the best level's", "against naive"], rows)
    )


def variants(cases: Sequence[Case]) -> str:
    """Ours with other temperatures and strides."""
    found = [c for c in cases if c["about"]["group"] == "variants"]
    rows = []
    for case in found:
        base = figures.median(case, "T=2")
        for name, provider in case["providers"].items():
            own = provider.get("median_s")
            rows.append(
                [
                    case["title"].partition(",")[0],
                    name,
                    cell(case, name),
                    f"{own / base - 1:+.0%}" if own and base else "–",
                ]
            )
    return titled("Variants of kd, ours only", table(["case", "variant", "time", "against T=2"], rows))


def against_targets(cases: Sequence[Case]) -> str:
    """What was to be reached."""
    rows = targets.rows(cases)
    met = sum(row[-1] == "yes" for row in rows)
    about = (
        f"{met} of {len(rows)} met. They are for two cores with AVX-512 that do nothing else. Measured figures have "
        "a digit more here than elsewhere, and as many as the verdict needs."
    )
    return titled("Targets", table(["target", "required", "measured", "met"], rows), about)


def losses(cases: Sequence[Case]) -> str:
    """Where somebody else is faster, or as fast."""
    lost, tied = figures.lost_and_tied(cases)
    lines = [f"- slower: {line}" for line in lost] + [
        f"- tie: {line.replace(' to ', ' with ')}" for line in tied
    ]
    lines += [f"- no time, because it is wrong or did not run: {title}" for title in figures.untimed(cases)]
    return titled("Where ours loses or ties (within 5%)", "\n".join(lines) or "Nowhere in this run.")


def absent(result: dict[str, Any]) -> str:
    """The peers that are not there."""
    lines = [f"- {name}: {why}" for name, why in result["absent"].items()]
    return titled("Absent, so not measured", "\n".join(lines))


def notes(result: dict[str, Any]) -> str:
    """How to read it."""
    counts = sorted(case["rounds"] for case in result["cases"]) or [0]
    return titled(
        "How to read this",
        f"Medians of {counts[0]} to {counts[-1]} rounds in which the providers run one after another in shuffled "
        "order; ±: half the interquartile range. naive: `benchmarks/naive.py`; compile: `torch.compile` of it, "
        "default inductor, static shapes; pure torch: fasttransfer without its native kernels. GB/s: the floor's "
        "bytes (each input read once, each output written once) over the time; of roofline: that over the GB/s of a "
        "plain torch call in the same rounds. memory: the most that torch's allocator held beyond what it held before "
        "the call. error: norm-wise, relative to float64. Small cases are bound by the cost of a call and have no "
        "share of the roofline.",
    )
