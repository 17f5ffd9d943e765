"""Writes the results table of the README from a committed run of the demo, and the tables of two guides.

Run it:  python -m examples.demo && cp demo/results.json examples/results/NAME.json && python -m examples.readme
         python -m examples.s9_choosing_a_source --save examples/results/choosing-a-source.json
         python -m examples.language_model --save examples/results/language-model.json --plots docs/images

Everything between the two markers of a table is replaced; nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme import write_block
from examples import s3_distillation as s3
from examples import s6_fusion as s6
from examples import s8_cross_domain as s8
from examples import s9_choosing_a_source as s9
from examples.seeds import verdict
from examples.tables import plus_minus

RESULTS = Path(__file__).resolve().parent / "results"
RESULT, CHOICE = RESULTS / "cpu-epyc-2core.json", RESULTS / "choosing-a-source.json"
LANGUAGE = RESULTS / "language-model.json"

# Which rows, and compared with what; without one row for all, each with its own. The whole tables are in the report of
# the demo.
CHOSEN = {
    ("distillation", "A student that never saw a 3: accuracy on 3s", "missing", s3.HARD): [
        s3.HARD, s3.BLIND, s3.distilled_at(1.0), s3.distilled_at(4.0), s3.distilled_at(8.0)],
    ("cross_domain.clean", "5 labels per class in another domain", "target", s8.SCRATCH): [
        s8.SCRATCH, s8.ZERO, s8.FROZEN, s8.TUNED, s8.CHOSEN, s8.BLENDED],
    ("cross_domain.wrong", "The same, 30% of the labels wrong", "target", s8.ZERO): [
        s8.SCRATCH, s8.ZERO, s8.TUNED, s8.STOPPED, s8.DECAYED, s8.CHOSEN, s8.BLENDED, s8.RELATED, s8.STRANGER],
    ("cross_domain.clean", "Each refinement against what it refines, all labels right", "target", None): s8.REFINED,
    ("cross_domain.wrong", "Each refinement against what it refines, 30% wrong", "target", None): s8.REFINED,
    ("cross_domain.classes", "From the digits 0-4 to 5-9, 5 labels per class", "target", s8.SCRATCH): [
        s8.SCRATCH, s8.HEAD_FIRST],
    ("fusion", "A CNN's features mapped into a GRU, whose head is kept", "target", s6.GRU_ALONE): [
        s6.GRU_ALONE, s6.CNN_ALONE, s6.FUSED, s6.RANDOM],
}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    environment, seeds = results["environment"], results["seeds"]
    lines = [
        "| what was done | test accuracy, % | gain on the row marked – (or named), seeds won | verdict |",
        "|---|---:|---:|---|",
    ]
    for (where, title, figure, baseline), rows in CHOSEN.items():
        part = results
        for key in where.split("."):
            part = part[key]
        lines.append(f"| **{title}** | | | |")
        for row in rows:
            name, control = (row, baseline) if isinstance(row, str) else row
            method = part["methods"][name]
            against = method["against"].get(control)
            gain = (
                f"{100 * against['difference']:+.1f}, {against['wins']} of {against['of']}"
                if against
                else "–"
            )
            says = verdict(against) if against else ""
            label = name if control == baseline else f"{name}, against {control}"
            lines.append(f"| &nbsp;&nbsp;{label} | {plus_minus(method[figure])} | {gain} | {says} |")
    lines += [
        "",
        f"Mean ± standard deviation over the seeds {seeds[0]} to {seeds[-1]}; differences are paired by seed, with the "
        "seeds won; *helps* and *hurts* take 7 of 8. Hyperparameters are chosen on training or validation data, test "
        f"images are seen once per method. {environment['cpu']}, torch {environment['torch']}, commit "
        f"{environment['commit']}; reproduce: `make demo`, then `python -m examples.readme demo/results.json`.",
    ]
    return "\n".join(lines)


def choice() -> str:
    """The tables of docs/choosing.md, of the committed run."""
    saved = json.loads(CHOICE.read_text())
    seeds = len(saved["results"]["sources"])
    return f"{s9.markdown(saved['results'])}\n\nMean ± standard deviation over {seeds} seeds. {_where(saved)}"


def language() -> str:
    """The tables of docs/language_models.md, of the committed run."""
    from examples import language_model  # transformers is an extra

    saved = json.loads(LANGUAGE.read_text())
    return f"{language_model.markdown(saved['results'])} {_where(saved, 1)}"


def _where(saved: dict[str, Any], threads: int | None = None) -> str:
    env = saved["environment"]
    return (
        f"{env['cpu']}, {threads or env['threads']} thread(s), torch {env['torch']}, commit {env['commit']}."
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    write_block("demo", table(json.loads(options.result.read_text())))
    write_block("choosing", choice(), "docs/choosing.md")
    write_block("language_model", language(), "docs/language_models.md")


if __name__ == "__main__":
    main()
