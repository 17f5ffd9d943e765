"""The result file: what a run has measured, as small as the report needs it, and checked when it is read.

`pytest --benchmark-json` writes all of it as `extra_info`, with every single time, and much that nobody reads;
`compact` makes of that the file that is committed under `benchmarks/results/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = 2
COMMITTED = Path(__file__).resolve().parent / "results"
NOTE = "fasttransfer"  # under this name the environment stands in pytest-benchmark's machine_info

_ENVIRONMENT = {
    "cpu": str,
    "cores": int,
    "threads": int,
    "simd": str,
    "torch": str,
    "commit": str,
    "gpu": str,
}
_CASE = {"key": str, "title": str, "operation": str, "about": dict, "floor_bytes": int, "rounds": int,
         "providers": dict, "rooflines": dict}  # fmt: skip
_PROVIDER = {"ours": bool, "ok": bool, "ran": bool, "note": str}
_TIMES = ("median_s", "q1_s", "q3_s", "gb_per_s")


class ResultError(ValueError):
    """A file that is not a result, or not of this format."""


def result_of(
    cases: Iterable[dict[str, Any]], tag: str, environment: dict[str, Any], absent: dict[str, str]
) -> dict[str, Any]:
    """A result of measured cases (`timing.measure`), without their single times."""
    kept = [_trimmed(case) for case in cases]
    timing, others = (sum(case.get(key, 0.0) for case in kept) for key in ("timing_s", "others_s"))
    busy = max(0.0, others / timing) if timing else 0.0
    return {
        "format": FORMAT,
        "tag": tag,
        "environment": environment | {"cores_busy_with_others": round(busy, 3)},
        "absent": absent,
        "cases": kept,
    }


def _trimmed(value: Any) -> Any:
    """Without lists of samples, and with six digits."""
    if isinstance(value, dict):
        return {key: _trimmed(each) for key, each in value.items() if key != "samples_s"}
    if isinstance(value, list):
        return [_trimmed(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """A result of what pytest-benchmark wrote."""
    about = raw.get("machine_info", {}).get(NOTE)
    if about is None:
        raise ResultError(
            "this JSON is pytest-benchmark's, but not of this suite: its machine_info lacks ours"
        )
    cases = [bench["extra_info"] for bench in raw["benchmarks"]]
    return result_of(cases, about["tag"], about["environment"], about["absent"])


def load(path: Path) -> dict[str, Any]:
    """A result file, or a JSON of pytest-benchmark.

    Raises:
        ResultError: It is neither, or of another format; the message says where it is wrong.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: not JSON: {error}") from None
    try:
        if isinstance(found, dict) and "machine_info" in found and "benchmarks" in found:
            found = compact(found)
        check(found)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return found


def committed() -> list[Path]:
    """The results in `benchmarks/results/`, one per machine, by name."""
    return sorted(COMMITTED.glob("*.json"))


def save(result: dict[str, Any], path: Path) -> None:
    """Write it, checked."""
    check(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def check(result: Any) -> None:
    """That it is what the report reads.

    Raises:
        ResultError: It is not.
    """
    if not isinstance(result, dict) or "cases" not in result:
        raise ResultError("not a benchmark result: no cases")
    if result.get("format") != FORMAT:
        raise ResultError(
            f"a result of format {result.get('format', 1)}, and this reads format {FORMAT}: measure again (make bench)"
        )
    for name in ("tag", "environment", "absent"):
        if name not in result:
            raise ResultError(f"{name} is missing")
    _check_fields(result["environment"], _ENVIRONMENT, "environment")
    for number, case in enumerate(result["cases"]):
        where = f"case {case.get('key', number) if isinstance(case, dict) else number}"
        _check_fields(case, _CASE, where)
        for name, provider in case["providers"].items():
            _check_fields(provider, _PROVIDER, f"{where}, {name}")
            if provider["ok"]:
                _check_fields(provider, dict.fromkeys(_TIMES, (int, float)), f"{where}, {name}")
        for name, roofline in case["rooflines"].items():
            _check_fields(roofline, dict.fromkeys(_TIMES, (int, float)), f"{where}, {name}")


def _check_fields(record: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(record, dict):
        raise ResultError(f"{where}: an object is expected, got {type(record).__name__}")
    for name, kind in fields.items():
        if name not in record:
            raise ResultError(f"{where}: {name} is missing")
        if not isinstance(record[name], kind):
            expected = kind.__name__ if isinstance(kind, type) else "a number"
            raise ResultError(f"{where}: {name} must be {expected}, got {record[name]!r}")


def failures(result: dict[str, Any]) -> list[str]:
    """Every wrong or missing answer of ours and of the naive code it is compared with. A time is never a failure."""
    return [line for case in result["cases"] for line in failures_of(case)]


def failures_of(case: dict[str, Any]) -> list[str]:
    """Those of one case."""
    return [
        f"{case['title']}, {name}: {provider['note']}"
        for name, provider in case["providers"].items()
        if not provider["ok"] and (provider["ours"] or name.startswith("naive"))
    ]
