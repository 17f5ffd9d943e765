"""The build: what is decided and why, what was compiled, and that both agree with what is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fasttransfer
from build_tools import compile as native
from build_tools import decide, probe, release, weak_symbols
from build_tools.decide import BuildError, Plan
from build_tools.ninja_file import jobs
from build_tools.nvcc import Nvcc
from build_tools.probe import Compiler, Facts, Torch

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = Torch("2.13.0+cpu", None, Path("/torch"))
CUDA_TORCH = Torch("2.13.0+cu130", "13.0", Path("/torch"))
GXX = Compiler(("g++",), "g++ 12.2.0", ("baseline", "avx2", "avx512"))
NVCC = Nvcc(
    "/cuda/bin/nvcc", "13.0", ("7.5", "8.0", "9.0", "10.0", "12.0"), "/cuda/lib/libcudart_static.a", "g++"
)

# A machine that has everything; each test takes something away.
EVERYTHING = Facts(
    compiler=GXX,
    torch=CUDA_TORCH,
    nvcc=NVCC,
    cuda_sources=("csrc/cuda/kd.cu",),
)
PROBLEMS = ["sources_problem", "platform_problem", "compiler_problem", "tools_problem", "torch_problem"]


def installed_record() -> dict:
    return json.loads(Path(fasttransfer.__file__).with_name("_build.json").read_text())


# ------------------------------------------------------------------------------------- FASTTRANSFER_NATIVE


@pytest.mark.parametrize("requested", ["auto", "1"])
def test_native_is_built_where_nothing_is_missing(requested):
    decision = decide.decide_native(requested, EVERYTHING)
    assert decision.build
    assert "g++ 12.2.0" in decision.reason
    assert "2.13.0" in decision.reason


@pytest.mark.parametrize("problem", PROBLEMS)
def test_native_auto_falls_back_and_says_why(problem):
    decision = decide.decide_native("auto", replace(EVERYTHING, **{problem: "the widget is missing"}))
    assert not decision.build
    assert decision.reason == "the widget is missing"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_native_1_fails_and_says_why(problem):
    with pytest.raises(BuildError, match=r"FASTTRANSFER_NATIVE=1 .*the widget is missing"):
        decide.decide_native("1", replace(EVERYTHING, **{problem: "the widget is missing"}))


def test_native_0_builds_nothing():
    decision = decide.decide_native("0", EVERYTHING)
    assert not decision.build
    assert "FASTTRANSFER_NATIVE=0" in decision.reason


# -------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("given", "meant"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")]
)
def test_choices(given, meant):
    environ = {} if given is None else {"FASTTRANSFER_NATIVE": given}
    assert decide.read_choice(environ, "FASTTRANSFER_NATIVE") == meant


@pytest.mark.parametrize("name", ["FASTTRANSFER_NATIVE", "FASTTRANSFER_CUDA"])
def test_another_choice_names_the_variable_and_what_is_accepted(name):
    with pytest.raises(BuildError, match=rf"{name}='junk'.* auto .* 1 .* 0 "):
        decide.read_choice({name: "junk"}, name)


def test_setup_py_fails_clearly():
    environ = {**os.environ, "FASTTRANSFER_NATIVE": "junk"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: FASTTRANSFER_NATIVE='junk' is not understood" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("given", "arguments"), [("", []), ("3", ["-j", "3"])])
def test_max_jobs(given, arguments):
    assert jobs({"MAX_JOBS": given}) == arguments


@pytest.mark.parametrize("given", ["0", "-1", "many"])
def test_bad_max_jobs(given):
    with pytest.raises(BuildError, match=f"MAX_JOBS='{given}'"):
        jobs({"MAX_JOBS": given})


# -------------------------------------------------------------------------------------------------- facts


def test_absent_compilers_are_named():
    assert "CXX=/nonexistent" in probe.find_compiler({"CXX": "/nonexistent"})[1]
    assert "no C++ compiler" in probe.find_compiler({"PATH": "/nonexistent"})[1]


def test_a_compiler_that_fails_is_not_a_compiler():
    compiler, problem = probe.find_compiler({"PATH": os.environ["PATH"], "CXX": "false"})
    assert compiler is None
    assert "the C++ compiler false failed" in problem


def test_find_torch_agrees_with_torch():
    import torch

    found, problem = probe.find_torch()
    assert problem is None
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(("version", "usable"), [("2.9.1", False), ("2.10.0", True), ("3.0.0a0+git1", True)])
def test_oldest_torch(version, usable, tmp_path, monkeypatch):
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    spec = importlib.util.spec_from_file_location(
        "torch", tmp_path / "torch/__init__.py", submodule_search_locations=[str(tmp_path / "torch")]
    )
    monkeypatch.setattr(probe, "find_spec", lambda name: spec)
    found, problem = probe.find_torch()
    assert found.version == version
    assert (problem is None) is usable


# ------------------------------------------------------------------------------------------ what is compiled


def test_level_files_are_compiled_per_level_and_without_torch(tmp_path):
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    for name in ["module.cpp", "cpu/kd.cpp", "cpu/level.cpp", "cpu/level_blend.cpp"]:
        (tmp_path / "csrc" / name).touch()
    flags = {
        Path(unit.object).name: unit.flags for unit in native.units(tmp_path, GXX, CPU_TORCH, debug=False)
    }
    levels = {f"{stem}.{level}.o" for stem in ("level", "level_blend") for level in GXX.levels}
    assert set(flags) == {"module.o", "kd.o"} | levels
    assert "-DFT_ISA=avx2" in flags["level_blend.avx2.o"]
    assert "-mavx2" in flags["level_blend.avx2.o"]
    assert not any(flag.startswith("-m") for name in ("kd.o", "level.baseline.o") for flag in flags[name])
    assert {"-DFT_HAVE_AVX2", "-DFT_HAVE_AVX512"} <= set(flags["kd.o"])
    assert not any("torch" in flag.lower() for name in levels for flag in flags[name])


@pytest.mark.parametrize("requested", ["auto", "0"])
def test_record_without_the_native_part(requested):
    choices = {"native": requested, "cuda": "auto"}
    facts = replace(EVERYTHING, compiler_problem="no C++ compiler was found", cuda_sources=())
    plan = Plan(decide.decide_native(requested, facts), decide.decide_cuda("auto", facts), choices, facts)
    record = plan.record("0.1.0")
    assert record["native"] is False
    assert (record["torch"], record["compiler"], record["levels"]) == (None, None, [])
    assert "pure torch" in decide.describe(record)
    assert record["native_reason"] in decide.describe(record)


def test_weak_symbols_reads_nm():
    listing = (
        "0000000000000000 T ft::avx2::kd(float const*)\n"
        "0000000000000000 W std::vector<int, std::allocator<int> >::push_back(int const&)\n"
        "0000000000000000 u ft::table()::entries\n"
        "0000000000000010 V vtable for ft::Kernel\n"
        "                 w __cxa_finalize\n"
        "                 U expf\n"
        "\n"
        "/tmp/level.avx2.o:\n"
    )
    assert [name.split("(")[0].split("<")[0] for name in weak_symbols.weak_symbols(listing)] == [
        "std::vector",
        "ft::table",
        "vtable for ft::Kernel",
    ]


def test_level_objects_define_no_weak_symbols():
    objects = weak_symbols.level_objects(ROOT)
    if not objects:
        pytest.skip(f"no level objects in {native.object_dir(ROOT)}: nothing was compiled in this tree")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    if native.is_debug(os.environ):
        pytest.skip("FASTTRANSFER_DEBUG=1 compiles without the inlining that this relies on")
    assert weak_symbols.check(objects) == {}


# ---------------------------------------------------------------------------------------- what is installed


def test_record_agrees_with_what_is_installed():
    record = installed_record()
    assert record["version"] == importlib.metadata.version("fasttransfer")
    assert record["native"] is (importlib.util.find_spec("fasttransfer._C") is not None)
    assert ("baseline" in record["levels"]) is record["native"]
    assert Path(fasttransfer.__file__).with_name("_cuda.so").is_file() is record["cuda"]


@pytest.mark.skipif(
    os.environ.get("FASTTRANSFER_BACKEND") == "reference",
    reason="FASTTRANSFER_BACKEND=reference loads nothing",
)
def test_record_agrees_with_what_is_loaded():
    info, record = fasttransfer.build_info(), installed_record()
    assert info["cpu_kernels"] is record["native"], info["cpu_reason"]
    assert set(info["simd_levels"]) <= set(record["levels"])


@pytest.mark.parametrize(("requested", "warns"), [("auto", True), ("0", False)])
def test_import_says_that_the_native_part_is_missing(requested, warns, tmp_path):
    """pip hides what a build prints, so a fallback that nobody asked for is said at import."""
    package = Path(fasttransfer.__file__).parent
    shutil.copytree(package, tmp_path / "fasttransfer", ignore=shutil.ignore_patterns("_*.so", "__pycache__"))
    record = installed_record() | {
        "native": False,
        "native_reason": "no C++ compiler was found",
        "requested": {"native": requested, "cuda": "auto"},
    }
    (tmp_path / "fasttransfer/_build.json").write_text(json.dumps(record))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FASTTRANSFER_")}
    environ["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-c", "import fasttransfer; print(fasttransfer.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert ("no C++ compiler was found" in done.stderr) is warns, done.stderr


# ------------------------------------------------------------------------------------------------- version


@pytest.mark.parametrize(
    "given, appended", [("", ""), ("cu128", "+cu128"), ("cu128.torch2", "+cu128.torch2")]
)
def test_local_version(given, appended):
    assert decide.local_version({"FASTTRANSFER_LOCAL_VERSION": given}) == appended


@pytest.mark.parametrize("given", ["+cu128", "cu_128", "cu..1", "CU128"])
def test_bad_local_version(given):
    with pytest.raises(BuildError, match="FASTTRANSFER_LOCAL_VERSION"):
        decide.local_version({"FASTTRANSFER_LOCAL_VERSION": given})


def test_one_version():
    assert fasttransfer.__version__ == fasttransfer.build_info()["version"] == installed_record()["version"]
    assert fasttransfer.__version__.partition("+")[0] == release.version_of(
        (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.parametrize(
    "tag, heading, said",
    [
        ("v1.2.0", "## [1.2.0] - 2026-01-31", []),
        ("v1.2.0", "## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n## [1.1.0] - 2025-01-31", []),
        ("v1.2.1", "## [1.2.0] - 2026-01-31", ["pyproject.toml has 1.2.0"]),
        ("1.2.0", "## [1.2.0] - 2026-01-31", ["v1.2.0 is expected"]),
        ("v1.2.0", "## [Unreleased]", ["CHANGELOG.md is none"]),
        ("v1.2.0", "## [1.2.0]", ["no date"]),
        ("v2", "## [1.1.0] - 2026-01-31", ["tag is v2", "CHANGELOG.md is 1.1.0"]),
    ],
)
def test_a_tag_is_the_version(tag, heading, said):
    found = release.problems(tag, 'version = "1.2.0"', f"# Changelog\n\n{heading}\n")
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True))


def test_the_changelog_has_the_form_that_a_release_needs():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    dated = release.problems(
        "v9.9.9", 'version = "9.9.9"', text.replace(headings[0], "## [9.9.9] - 2026-01-31")
    )
    assert not dated
