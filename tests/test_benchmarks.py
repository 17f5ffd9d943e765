"""The benchmarks' own machinery: verdicts, arithmetic, the result file, the reports. No time is asserted."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import figures, oracle, targets
from benchmarks.cases import OURS, TAGS, everything, select
from benchmarks.cases.common import KINDS
from benchmarks.compare import compare
from benchmarks.memory import peak_bytes
from benchmarks.readme import chosen, table
from benchmarks.report import markdown, write
from benchmarks.results import (
    ResultError,
    check,
    committed,
    compact,
    failures,
    failures_of,
    load,
    result_of,
    save,
)
from benchmarks.shapes import gpt2, numbers, resnet18, small_tensors, vit_b16
from benchmarks.suite import EFFORTS
from benchmarks.timing import Case, Provider, Race, Roofline, measure, verdict

pytest_plugins = ["pytester"]

ENVIRONMENT = {
    "cpu": "a processor", "cores": 2, "threads": 2, "simd": "avx512", "torch": "2.13.0", "commit": "abc",
    "gpu": "none",
}  # fmt: skip


def provider(name: str, value: float, **more: Any) -> Provider:
    """Computes a number; 3 is right."""
    return Provider(name, lambda x: x + value, lambda: torch.zeros(4), lambda _, out: [out], **more)


def tiny_case(*providers: Provider, **more: Any) -> Case:
    """Everybody is to compute four times 3."""
    roofline = Roofline(Provider("roof", lambda x: x + 1, lambda: torch.zeros(4), lambda _, out: [out]), 1000)
    return Case(
        key="tiny", title="tiny", operation="kd", floor_bytes=500, providers=list(providers),
        error=lambda _, out: oracle.relative_error(out, [torch.full((4,), 3.0).double()]), rooflines=[roofline],
        about={"group": "forward+backward", "dtype": "fp32", "rows": 2, "vocab": 2}, **more,
    )  # fmt: skip


def timed(median: float, *, ours: bool = False, **more: Any) -> dict[str, Any]:
    """A provider's record with a spread of 2%."""
    return {
        "ours": ours, "ok": True, "ran": True, "error": 1e-7, "note": "", "median_s": median, "q1_s": 0.99 * median,
        "q3_s": 1.01 * median, "calls": 9, "gb_per_s": 1.0, "peak_bytes": 1000, **more,
    }  # fmt: skip


def case_of(key: str, providers: dict[str, Any], **about: Any) -> dict[str, Any]:
    """A measured case."""
    about = {"group": "forward+backward", "dtype": "fp32", "rows": 8, "vocab": 10, **about}
    return {
        "key": key, "title": key.replace("_", " "), "operation": "kd", "about": about, "dtype": "fp32",
        "floor_bytes": 100, "rounds": 8, "calls_per_round": 1, "timing_s": 1.0, "others_s": 0.0,
        "providers": providers, "rooflines": {"torch.add(a, b)": timed(1e-3)},
    }  # fmt: skip


def synthetic(scale: float = 1.0) -> dict[str, Any]:
    """A result with a win, a loss, a wrong rival, threads, SIMD levels, a scan, given memory."""
    ours = timed(1e-3 * scale, ours=True, of_roofline=0.8, roofline="torch.add(a, b)")
    wrong = {"ours": False, "ok": False, "ran": True, "error": 0.5, "note": "relative error 5.0e-01 ..."}
    cases = [
        case_of("won", {"naive": timed(1e-2), OURS: ours}),
        case_of("lost", {"naive": timed(5e-4), "torch.compile": wrong, OURS: ours}),
        case_of(
            "threads",
            {f"{OURS}, 1 thread": timed(2e-3, ours=True), f"{OURS}, 2 threads": ours},
            group="threads",
        ),
        case_of(
            "levels", {"naive": timed(1e-2), f"{OURS}, avx512": ours, f"{OURS}, avx2": ours}, group="simd"
        ),
        case_of("given", {OURS: ours, f"{OURS}, inplace=True": ours}, group="cliff"),
        case_of("varied", {"T=2": ours, "T=1": ours}, group="variants"),
    ]
    cases[2]["rooflines"] = {"1": timed(2e-3), "2": timed(1e-3)}
    sizes = [(8, 32000), (64, 32000), (128, 32000), (254, 32000), (31, 262144), (8128, 1000)]
    cases += [
        case_of(f"scan_{r}x{v}", {"naive": timed(1e-8 * r * v), OURS: timed(1e-9 * r * v * scale + 1e-5, ours=True)},
                group="scan", rows=r, vocab=v) for r, v in sizes
    ]  # fmt: skip
    return result_of(cases, "full", dict(ENVIRONMENT), {"some peer": "No module named 'peer'"})


def test_a_wrong_provider_gets_no_time_and_ours_is_a_failure() -> None:
    case = tiny_case(provider("naive", 3.0), provider("rival", 4.0), provider(OURS, 5.0, ours=True))
    result = measure(case, 8, 0.01)
    assert "median_s" in result["providers"]["naive"]
    for name in ("rival", OURS):
        assert not result["providers"][name]["ok"]
        assert "median_s" not in result["providers"][name]
    assert [line.partition(":")[0] for line in failures_of(result)] == [f"tiny, {OURS}"]


def test_a_wrong_result_of_ours_fails_the_bench_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)  # else pytest-benchmark writes nothing
    pytester.makeconftest("from benchmarks.conftest import *")
    pytester.makepyfile(
        """
        from benchmarks.cases import Spec
        from benchmarks.suite import Effort, bench
        from tests.test_benchmarks import OURS, provider, tiny_case

        def spec_of(value):
            providers = provider("naive", 3.0), provider(OURS, value, ours=True)
            return Spec("k", "t", "kd", lambda spec, kinds: tiny_case(*providers))

        def test_right(benchmark):
            bench(spec_of(3.0), benchmark, Effort(8, 0.01, frozenset()), print)

        def test_wrong(benchmark):
            bench(spec_of(3.1), benchmark, Effort(8, 0.01, frozenset()), print)
        """
    )
    raw = pytester.path / "raw.json"
    outcome = pytester.runpytest_inprocess(
        f"--benchmark-json={raw}", "-p", "no:cacheprovider", "-p", "no:xdist"
    )
    outcome.assert_outcomes(passed=1, failed=1)
    result = compact(json.loads(raw.read_text()))  # everything is in pytest-benchmark's own file
    assert [case["key"] for case in result["cases"]] == ["tiny", "tiny"]
    assert result["cases"][0]["providers"][OURS]["gb_per_s"] > 0
    assert len(failures(result)) == 1


def test_what_does_not_run_is_a_note() -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    found = verdict(tiny_case(), replace(provider("x", 3.0), call=broken))
    assert (found["ok"], found["ran"], found["note"]) == (False, False, "RuntimeError: no compiler")


@pytest.mark.parametrize("wrong", [torch.full((4,), float("nan")), torch.full((5,), 3.0)])
def test_nan_and_wrong_shapes_are_wrong(wrong: Tensor) -> None:
    found = verdict(tiny_case(), replace(provider("x", 3.0), call=lambda _: wrong))
    assert not found["ok"]
    assert found["error"] is None


def test_ours_is_held_to_less_than_others_in_bfloat16() -> None:
    case = tiny_case(dtype="bf16")
    assert verdict(case, provider("rival", 3.1))["ok"]
    assert not verdict(case, provider(OURS, 3.1, ours=True))["ok"]


def test_the_share_of_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"naive": 4e-6, OURS: 1e-6, "roof": 1e-6, "given": 2e-7}
    monkeypatch.setattr("benchmarks.timing.time_once", lambda p: seconds[p.name])
    given = Roofline(replace(provider("given", 1.0)), 1000)
    case = tiny_case(provider("naive", 3.0), provider(OURS, 3.0, ours=True))
    case = replace(case, rooflines=[*case.rooflines, given])
    result = measure(case, 8)
    # 500 bytes in 1 us are 0.5 GB/s; the roofline call moves 1000 in 1 us, 1 GB/s.
    assert result["rooflines"]["roof"]["gb_per_s"] == pytest.approx(1.0)
    assert result["providers"][OURS]["gb_per_s"] == pytest.approx(0.5)
    assert result["providers"][OURS]["of_roofline"] == pytest.approx(0.5)
    assert result["providers"]["naive"]["of_roofline"] == pytest.approx(0.125)
    judged = replace(case, providers=[provider(OURS, 3.0, ours=True, roofline="given")])
    assert measure(judged, 8)["providers"][OURS]["of_roofline"] == pytest.approx(0.1)
    small = replace(case, memory_bound=False)
    assert "of_roofline" not in measure(small, 8)["providers"][OURS]


def test_every_provider_is_called_as_often_within_its_setting() -> None:
    entered = []

    class Setting:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *_: object) -> None:
            entered.pop()

    def call(_: Tensor) -> Tensor:
        assert entered
        return torch.full((4,), 3.0)

    inside = replace(provider("inside", 3.0), call=call, around=Setting)
    race = Race([inside, provider("outside", 3.0)], calls_per_round=3)
    assert race.warm_up(rounds=50, seconds=0.0) == 8  # the fewest
    race.round()
    assert {name: len(times) for name, times in race.samples.items()} == {"inside": 3, "outside": 3}


def test_peak_memory_of_a_call() -> None:
    a = torch.randn(1000)
    found = peak_bytes(lambda: (a + 1).add_(1) + 1)
    assert found is not None
    assert 8000 <= found < 8400
    assert peak_bytes(lambda: a.add_(1)) < 100


def test_the_oracle_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    labels = torch.randint(5, (7,))
    whole = oracle.kd_with_labels(student, teacher, labels, 2.0, 0.3)
    monkeypatch.setattr(oracle, "PIECE", 10)  # two rows a piece, the last of one
    exact = oracle.Distillation(student, teacher, labels, 2.0, 0.3)
    assert exact.error(whole) < 1e-14
    assert exact.error(whole[:1]) < 1e-14
    assert exact.error([whole[0], whole[1] * 1.01]) == pytest.approx(0.01)
    assert exact.error([whole[0] * float("nan"), whole[1]]) == float("inf")


def test_tags_and_keys() -> None:
    keys = [spec.key for spec in everything()]
    assert len(keys) == len(set(keys))
    assert set(TAGS) == set(EFFORTS)
    for tag in TAGS:
        assert {spec.operation for spec in select(tag)} == {"kd", "l2sp", "blend"}
    assert len(select("smoke")) < len(select("quick")) < len(select("full")) == len(keys)
    for operation in ("kd", "l2sp", "blend"):
        assert all(spec.operation == operation for spec in select("full", operation))
    with pytest.raises(ValueError, match="tags are"):
        select("fast")


def test_the_sizes_that_the_issue_asks_for_are_there() -> None:
    keys = {spec.key for spec in everything()}
    for size in ("8x10", "64x1000", "1024x1000", "256x32000", "64x128256", "32x262144"):
        assert {f"kd_{size}", f"kd_{size}_bf16", f"kd_forward_{size}"} <= keys
    assert {"kd_4096x32000_new_and_given_memory", "kd_labels_256x32000_bf16"} <= keys
    for model in ("ResNet-18", "ViT-B16", "GPT-2", "600_small"):
        assert {f"l2sp_add_grad_{model}", f"blend_EMA_{model}", f"blend_many_x4_{model}"} <= {
            key.replace("__", "_") for key in keys
        }


def test_a_case_says_of_itself_what_its_line_in_the_list_says() -> None:
    scanned = [spec for spec in everything() if spec.key in ("kd_1x1000", "kd_8x10", "blend_EMA_8x10")]
    assert {spec.about["group"] for spec in scanned} == {"scan", "forward+backward", "one"}
    for spec in scanned:
        assert spec.build(frozenset()).about == spec.about


@pytest.mark.parametrize(
    "spec", [spec for spec in select("quick") if "8x10" in spec.key], ids=lambda spec: spec.key
)
def test_the_smallest_cases_are_right(spec: Any) -> None:
    result = measure(spec.build(KINDS - {"compile"}), 8, 0.0)
    assert all(provider["ok"] for provider in result["providers"].values()), result["providers"]


def test_the_models_have_the_parameters_that_they_have() -> None:
    counts = [(len(shapes), numbers(shapes)) for shapes in (resnet18(), vit_b16(), gpt2(), small_tensors())]
    assert counts == [(62, 11_689_512), (152, 86_567_656), (148, 124_439_808), (600, 121_920)]


def test_a_result_goes_to_a_file_and_back(tmp_path: Path) -> None:
    result = synthetic()
    save(result, tmp_path / "result.json")
    assert load(tmp_path / "result.json") == json.loads(json.dumps(result))


def test_single_times_are_left_out() -> None:
    case = measure(tiny_case(provider(OURS, 3.0, ours=True)), 8, 0.0)
    assert len(case["providers"][OURS]["samples_s"]) == 8
    result = result_of([case], "smoke", dict(ENVIRONMENT), {})
    assert "samples_s" not in json.dumps(result)
    check(result)


def test_a_file_that_is_no_result_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ResultError, match="no such file"):
        load(path)
    for text, says in {
        "{": "not JSON",
        "[]": "not a benchmark result",
        '{"environment": {}, "cases": []}': "format 1, and this reads format 2",
        '{"machine_info": {}, "benchmarks": []}': "not of this suite",
    }.items():
        path.write_text(text)
        with pytest.raises(ResultError, match=says):
            load(path)


def test_what_is_missing_in_a_result_is_named() -> None:
    result = synthetic()
    for damage, says in (
        (lambda r: r["environment"].pop("cpu"), "environment: cpu is missing"),
        (lambda r: r["cases"][0].pop("floor_bytes"), "case won: floor_bytes is missing"),
        (
            lambda r: r["cases"][1]["providers"][OURS].pop("median_s"),
            "case lost, fasttransfer: median_s is missing",
        ),
        (
            lambda r: r["cases"][1]["providers"]["naive"].update(q1_s="fast"),
            "q1_s must be a number, got 'fast'",
        ),
    ):
        broken = copy.deepcopy(result)
        damage(broken)
        with pytest.raises(ResultError, match=says):
            check(broken)


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_every_committed_result_can_be_read_and_shown(path: Path) -> None:
    result = load(path)
    assert not failures(result)
    assert f"| processor | {result['environment']['cpu']}" in markdown(result)
    text = table(result, path)
    assert f"[{path.stem}](benchmarks/results/{path.name})" in text
    assert result["environment"]["commit"] in text
    for other in committed():
        assert f"(benchmarks/results/{other.name})" in text  # other machines are named too
        differ = result["environment"]["cpu"] != load(other)["environment"]["cpu"]
        assert ("Different machines" in compare(result, load(other))) >= differ


def test_the_result_of_the_readme_is_the_one_asked_for_or_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.results.COMMITTED", tmp_path)
    with pytest.raises(ResultError, match="no result"):
        chosen(None)
    for name, date in (("a", "2026-02-01 10:00 UTC"), ("b", "2026-11-21 13:35 UTC"), ("c", None)):
        result = synthetic()
        result["environment"] |= {"date": date} if date else {}
        save(result, tmp_path / f"{name}.json")
    assert chosen(None) == tmp_path / "b.json"
    assert chosen("a") == tmp_path / "a.json"
    assert chosen("bench/result.json") == Path("bench/result.json")


def test_the_report_of_a_tiny_result(tmp_path: Path) -> None:
    written = write(synthetic(), tmp_path)
    assert [path.name for path in written] == ["report.md", "speed-kd.png", "roofline.png", "cost.png"]
    assert all(path.stat().st_size > 500 for path in written)
    text = written[0].read_text()
    assert "a processor, 2 cores" in text
    assert "some peer: No module named 'peer'" in text
    assert "slower: lost to naive (0.50x)" in text
    assert "lost, torch.compile: relative error" in text  # a wrong rival says so, and has no time
    assert "**wrong**" in text
    assert "## Threads" in text
    assert "## SIMD levels" in text
    assert "## New and given memory" in text
    assert "262144" in text
    assert "![cost](cost.png)" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_every_target_names_cases_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(dict[str, Any]):
        def __missing__(self, key: str) -> Any:
            raise AssertionError(f"no case {key}")

    one, two = timed(2.0, ours=True, of_roofline=0.8), timed(1.0, ours=True)
    levels = {f"{OURS}, {level}": timed(1.0, ours=True) for level in ("avx512", "avx2", "baseline")}
    providers = {
        name: timed(4.0) for name in ("naive", "torch.compile", "_foreach_lerp_", "kd_loss, all columns")
    }
    providers |= {OURS: one, f"{OURS}, 1 thread": one, f"{OURS}, 2 threads": two} | levels
    cases = Known({spec.key: case_of(spec.key, providers) for spec in everything()})
    for case in cases.values():
        case["rooflines"] = {"1": timed(2.0), "2": timed(1.0)}
    found = [(target, target.measured(cases)) for target in targets.TARGETS]
    assert all(value is not None for _, value in found)
    assert targets.rows([]) == []
    threads = next(value for target, value in found if "second thread" in target.what)
    assert threads == pytest.approx(1.0)


@pytest.mark.parametrize(
    "required, at_most, value, shows",
    [
        (0.85, False, 0.846, "84.6%"),
        (0.85, False, 0.84996, "84.996%"),  # 85.0% would read as met
        (0.85, False, 0.85, "85.0%"),
        (0.85, False, 0.8504, "85.0%"),
        (0.85, True, 0.8504, "85.04%"),
        (1.0, False, 0.99996, "0.99996x"),
        (18, False, 11.666, "11.67x"),
    ],
)
def test_the_verdict_on_a_target_follows_from_what_is_printed(
    required: float, at_most: bool, value: float, shows: str
) -> None:
    show = figures.percent if shows.endswith("%") else figures.times
    assert targets.Target("", required, lambda _: value, show, at_most).shown(value) == shows


def test_the_report_of_next_to_nothing() -> None:
    text = markdown(
        result_of([case_of("won", {OURS: timed(1.0, ours=True)})], "smoke", dict(ENVIRONMENT), {})
    )
    assert "## Threads" not in text
    assert "won" in text


def test_the_table_of_the_readme_has_as_many_cells_in_every_row() -> None:
    providers = {"naive": timed(2.0), "_foreach_lerp_": timed(3.0), OURS: timed(1.0, ours=True)}
    result = result_of([case_of("kd_8x10", providers)], "full", dict(ENVIRONMENT), {})
    rows = [line for line in table(result).splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {row.count("|") for row in rows} == {8}
    assert "`_foreach_lerp_`" in rows[3]


def test_a_line_through_points() -> None:
    a, b, worst = figures.linear_fit([(x, 5e-6 + 2e-6 * x) for x in (1, 10, 100, 1000)])
    assert (a, b) == (pytest.approx(5e-6), pytest.approx(2e-6))
    assert worst < 1e-9


def test_comparing_says_what_moved() -> None:
    before, after = synthetic(), synthetic(scale=0.5)
    text = compare(before, after)
    assert "0 slower" in text
    assert "2x" in text.partition("## Moved beyond the spread")[2]
    assert "0 faster, 0 slower" in compare(before, before)
    assert "Moved beyond" not in compare(before, before)


def test_comparing_says_what_is_gone_and_what_broke() -> None:
    before, after = synthetic(), synthetic()
    gone = after["cases"].pop(0)
    after["cases"][0]["providers"]["naive"] = {
        "ours": False,
        "ok": False,
        "ran": True,
        "note": "off",
        "error": 1.0,
    }
    after["environment"] |= {"cpu": "another", "torch": "2.14.0"}
    text = compare(before, after)
    assert gone["title"] in text.partition("## Only before")[2]
    assert "- lost, naive: off" in text.partition("## No longer right")[2]
    assert "Different machines: a processor, 2 cores, and another, 2 cores" in text
    assert "Not like for like: torch differ" in text
    assert "Different machines" not in compare(before, before)
