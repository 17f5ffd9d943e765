"""Building and loading the CUDA kernels, without a GPU: what is decided, for which GPUs, and whether it would load."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fasttransfer
from build_tools import architectures, compile_cuda, cuda_symbols, decide, nvcc, ptxas_check
from build_tools.architectures import ArchitectureError
from build_tools.decide import BuildError
from build_tools.probe import look_around
from fasttransfer import native
from tests.test_build import CPU_TORCH, CUDA_TORCH, EVERYTHING, NVCC, installed_record

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")

# --------------------------------------------------------------------------------------- FASTTRANSFER_CUDA


@pytest.mark.parametrize(
    ("requested", "change", "built", "why"),
    [
        ("auto", {}, True, "nvcc 13.0"),
        ("1", {}, True, "nvcc 13.0"),
        ("0", {}, False, "FASTTRANSFER_CUDA=0 was set"),
        ("auto", {"torch": CPU_TORCH, "nvcc": None}, False, "2.13.0+cpu is not a CUDA build"),
        ("1", {"torch": CPU_TORCH}, True, "2.13.0+cpu"),  # wheels and compile checks without a CUDA torch
        ("auto", {"nvcc": None, "nvcc_problem": "nvcc was not found"}, False, "nvcc was not found"),
        ("auto", {"cuda_sources": ()}, False, "no CUDA sources"),
        ("auto", {"compiler_problem": "no C++ compiler"}, False, "no C++ compiler"),
        # Its runtime would ask for a driver that the machine need not have; the other way round is fine.
        ("auto", {"torch": replace(CUDA_TORCH, cuda="12.8")}, False, "newer than the CUDA 12.8 of torch"),
        ("1", {"torch": replace(CUDA_TORCH, cuda="12.8")}, True, "nvcc 13.0"),
        ("auto", {"nvcc": replace(NVCC, version="12.8")}, True, "nvcc 12.8"),
    ],
)
def test_decision(requested, change, built, why):
    decision = decide.decide_cuda(requested, replace(EVERYTHING, **change))
    assert decision.build is built
    assert why in decision.reason


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nvcc": None, "nvcc_problem": "nvcc was not found"}, "nvcc was not found"),
        ({"cuda_sources": ()}, "this version has no CUDA sources"),
        ({"torch_problem": "torch is not installed"}, "torch is not installed"),
    ],
)
def test_1_fails_and_says_why(change, why):
    with pytest.raises(BuildError, match=f"FASTTRANSFER_CUDA=1 .*{why}"):
        decide.decide_cuda("1", replace(EVERYTHING, **change))


def test_record_names_what_was_built():
    plan = decide.Plan(
        decide.decide_native("0", EVERYTHING),
        decide.decide_cuda("1", EVERYTHING),
        {"native": "0", "cuda": "1"},
        EVERYTHING,
        ("8.0", "9.0+PTX"),
    )
    record = plan.record("0.1.0")
    assert (record["cuda"], record["cuda_version"], record["architectures"]) == (
        True,
        "13.0",
        ["8.0", "9.0+PTX"],
    )
    assert record["torch"] == "2.13.0+cu130"
    assert "CUDA architectures: 8.0, 9.0+PTX" in decide.describe(record)


# ------------------------------------------------------------------------------------ TORCH_CUDA_ARCH_LIST


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (None, ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("9.0a", ("9.0a",)),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("9.0+PTX 8.6", ("8.6", "9.0+PTX")),
        ("10.0,9.0;;8.0", ("8.0", "9.0", "10.0")),
        ("8.0;8.0+PTX;8.0", ("8.0+PTX",)),
        ("9.0a+PTX;9.0", ("9.0", "9.0a+PTX")),
        ("Ampere", ("8.0", "8.6+PTX")),
        ("Ampere+Tegra;Hopper", ("8.7", "9.0+PTX")),
        ("Blackwell", ("10.0", "10.3", "12.0", "12.1+PTX")),
        ("10.0f", ("10.0f",)),
    ],
)
def test_architectures(asked, chosen):
    assert architectures.choose(asked, KNOWN) == chosen


@pytest.mark.parametrize(
    ("supported", "chosen"),
    [
        (("5.0", "7.5", "8.0", "9.0"), ("7.5", "8.0", "9.0+PTX")),
        (("10.0", "12.0", "13.0"), ("10.0", "12.0+PTX")),
        (("13.0", "14.0"), ("14.0+PTX",)),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(supported, chosen):
    assert architectures.choose(None, supported) == chosen


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("junk", "'junk' is not understood"),
        ("90", "'90' is not understood"),
        ("9.0-PTX", "'9.0-PTX' is not understood"),
        ("8.0;6.0", "does not compile for 6.0. It does for 7.5, 8.0"),
        ("Volta", "does not compile for 7.0"),
    ],
)
def test_bad_architectures_are_named(asked, why):
    with pytest.raises(ArchitectureError, match=f"TORCH_CUDA_ARCH_LIST.*{why}"):
        architectures.choose(asked, KNOWN)


def test_bad_architectures_stop_a_build(monkeypatch):
    monkeypatch.setattr(decide, "look_around", lambda environ, root, cuda: EVERYTHING)
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST: 'junk'"):
        decide.decide({"TORCH_CUDA_ARCH_LIST": "junk"}, ROOT)
    assert decide.decide({"TORCH_CUDA_ARCH_LIST": "9.0a"}, ROOT).architectures == ("9.0a",)
    assert decide.decide({"TORCH_CUDA_ARCH_LIST": "junk", "FASTTRANSFER_CUDA": "0"}, ROOT).architectures == ()


def test_gencode_flags():
    assert architectures.flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(("code", "name"), [("sm_75", "7.5"), ("sm_120", "12.0"), ("sm_90a", "9.0a")])
def test_capability(code, name):
    assert architectures.capability(code) == name


# -------------------------------------------------------------------------------------------------- finding nvcc


def fake_toolkit(root: Path, version: str = "13.0", compiles: bool = True, runtime: bool = True) -> Path:
    """An nvcc that says what a real one says."""
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    if runtime:
        (root / "lib/libcudart_static.a").touch()
    path = root / "bin/nvcc"
    path.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        "--list-gpu-code) printf 'sm_80\\nsm_90\\n';;\n"
        f"--dryrun) echo '#$ TOP={root}/bin/..' >&2;;\n"
        f"*) {'true' if compiles else 'echo nv/target: error: not found >&2; exit 1'};;\nesac\n"
    )
    path.chmod(0o755)
    return path


def test_nvcc_of_cuda_home(tmp_path):
    path = fake_toolkit(tmp_path / "cuda")
    found, problem = nvcc.find_nvcc({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": "/nonexistent"}, "g++")
    assert problem is None
    assert (found.path, found.version, found.major, found.supported) == (
        str(path),
        "13.0",
        13,
        ("8.0", "9.0"),
    )
    assert found.runtime == str(tmp_path / "cuda/lib/libcudart_static.a")


def test_cuda_home_is_the_only_place(tmp_path):
    fake_toolkit(tmp_path / "cuda")
    found, problem = nvcc.find_nvcc({"CUDA_HOME": "/nonexistent", "PATH": str(tmp_path / "cuda/bin")}, "g++")
    assert found is None
    assert "CUDA_HOME=/nonexistent has no bin/nvcc" in problem


def test_nvcc_of_pip(tmp_path, monkeypatch):
    path = fake_toolkit(tmp_path / "nvidia/cu13")
    monkeypatch.setattr(nvcc, "pip_roots", lambda: [tmp_path / "nvidia"])
    assert str(path) in list(nvcc.candidates({"PATH": "/nonexistent"}))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"version": "11.8"}, "is of CUDA 11.8, older than 12.0"),
        ({"compiles": False}, r"failed on a four-line kernel \(nv/target: error: not found\)"),
        ({"runtime": False}, "libcudart_static.a was not found"),
    ],
)
def test_an_nvcc_that_does_not_work_is_passed_over(how, why, tmp_path, monkeypatch):
    broken, good = fake_toolkit(tmp_path / "broken", **how), fake_toolkit(tmp_path / "good")
    monkeypatch.setattr(nvcc, "candidates", lambda environ: iter([str(broken)]))
    found, problem = nvcc.find_nvcc({}, "g++")
    assert found is None
    assert re.search(why, problem)
    monkeypatch.setattr(nvcc, "candidates", lambda environ: iter([str(broken), str(good)]))
    assert nvcc.find_nvcc({}, "g++")[0].path == str(good)


def test_no_nvcc_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setattr(nvcc, "candidates", lambda environ: iter(()))
    found, problem = nvcc.find_nvcc({}, "g++")
    assert found is None
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-cccl" in problem


# ---------------------------------------------------------------------------------------------- what is compiled


def test_every_source_is_one_object_with_all_architectures(tmp_path):
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    for name in ("kd.cu", "l2sp.cu", "kd.cuh"):
        (tmp_path / "csrc/cuda" / name).touch()
    folder = tmp_path / "build/cuda"
    library = compile_cuda.library(tmp_path, folder, NVCC, CPU_TORCH, ["8.0", "9.0+PTX"])
    assert [(unit.source, unit.object) for unit in library.units] == [
        ("csrc/cuda/kd.cu", "build/cuda/kd.o"),
        ("csrc/cuda/l2sp.cu", "build/cuda/l2sp.o"),
    ]
    flags = library.units[0].flags
    assert {
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-gencode=arch=compute_80,code=sm_80",
    } <= {*flags}
    # The linker drops a plain -ltorch, and torch's own copy of the CUDA runtime must not be taken for ours.
    assert library.link_flags[-4:] == ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
    assert NVCC.runtime in library.link_flags
    assert "-Wl,--exclude-libs,ALL" in library.link_flags


PTXAS = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN2ft4goodILi4EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN2ft4goodILi4EEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 64 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 3.125 ms
ptxas info    : Compiling entry function '_ZN2ft4goodILi4EEEvi' for 'sm_90a'
ptxas info    : Function properties for _ZN2ft4goodILi4EEEvi
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 8 bytes cumulative stack size
ptxas info    : Function properties for _Z6calledPf
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_ptxas_is_read():
    found = ptxas_check.parse(PTXAS)
    assert [
        (f.name[-10:], f.architecture, f.kernel, f.frame, f.spilled, f.registers, f.shared) for f in found
    ] == [
        ("dILi4EEEvi", "8.0", True, 0, 0, 12, 64),
        ("dILi4EEEvi", "9.0a", True, 16, 0, 14, 0),
        ("_Z5spillPf", "9.0a", True, 0, 20, 255, 0),
        ("Z6calledPf", "9.0a", False, 40, 0, 0, 0),
    ]
    assert [f.bad for f in found] == [False, True, True, True]
    assert len(ptxas_check.complaints(found)) == 3
    assert re.search(r"12 +14!", ptxas_check.table(found))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void ft::(anonymous namespace)::kd_row<ft::BFloat16, (int)4>(ft::KdParams)", "kd_row<BFloat16, 4>"),
        ("void ft::device::probe<0>()", "probe<0>"),
        ("ft::blend<float, (bool)1, ft::Two<int, 3> >(ft::P)", "blend<float, 1, Two<int, 3> >"),
        ("_Z3foov", "_Z3foov"),
    ],
)
def test_names_in_the_table_are_short(name, short):
    assert ptxas_check.short(name) == short


# ---------------------------------------------------------------------------------------------------- symbols

NM = """\
                 w __gmon_start__
                 U dlopen@GLIBC_2.34
                 U _ZSt4endl@GLIBCXX_3.4.11
                 U _ZNSt7stringCtor
                 U aoti_torch_get_numel
                 U aoti_torch_get_current_cuda_stream
                 U torch_newer_than_2_10
                 U cudaLaunchKernel
"""


def test_symbols_are_sorted():
    needed = cuda_symbols.undefined(NM)
    assert "__gmon_start__" not in needed
    here = frozenset({"aoti_torch_get_numel", "torch_newer_than_2_10"})
    found = cuda_symbols.sort_out(needed, here, frozenset({"_ZNSt7stringCtor"}))
    assert len(found.system) == 3
    assert found.wrong == (
        "torch_newer_than_2_10: torch 2.10 does not have it",
        "cudaLaunchKernel: neither torch nor the C and C++ libraries have it",
    )
    assert cuda_symbols.newest_versions(needed) == {"GLIBC": "2.34", "GLIBCXX": "3.4.11"}


# ------------------------------------------------------------------------------- a library, really made and loaded

SOURCE = """
#include "cuda/runtime.h"
namespace ft {
struct Params { float* y; int64_t n; };
FT_KERNEL void fine(FT_PARAMS(Params) p) {
  if (device::thread() < p.n) device::store_once(p.y + device::thread(), 1.f);
}
FT_KERNEL void frame(FT_PARAMS(Params) p) {  // an array with a computed index lies in local memory
  float held[64] = {}, sum = 0;
  for (int i = 0; i < 64; ++i) held[int(p.y[i]) % 64] += 1;
  for (int i = 0; i < 64; ++i) sum += held[i] * p.y[i];
  p.y[0] = sum;
}
torch::stable::Tensor probe(torch::stable::Tensor y) {
  const DeviceGuard guard(y);
  const device::Grid grid{device::machine().multiprocessors, 64, device::machine().most_cluster, 64 << 10};
  const Params params{static_cast<float*>(y.data_ptr()), y.numel()};
  device::launch(fine, grid, current_stream(y), params);
  device::launch(frame, grid, current_stream(y), params);
  return y;
}
STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) { m.impl("probe", TORCH_BOX(&probe)); }
}  // namespace ft
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source tree with one small CUDA source, compiled for one GPU: (its root, the functions that ptxas saw)."""
    facts = look_around(os.environ, ROOT, cuda="1")
    if facts.nvcc is None:
        pytest.skip(facts.nvcc_problem or facts.compiler_problem or facts.torch_problem or "no CUDA sources")
    root = tmp_path_factory.mktemp("tree")
    for header in ("core/macros.h", "cpu/dtype.h", "cuda/device.cuh", "cuda/launch.cuh", "cuda/runtime.h"):
        (root / "csrc" / header).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "csrc" / header, root / "csrc" / header)
    (root / "csrc/cuda/probe.cu").write_text(SOURCE)
    return root, ptxas_check.compile_all(root, "9.0", facts)


def test_local_memory_is_found(tree):
    complaints = ptxas_check.complaints(tree[1])
    assert len(complaints) == 1
    assert re.match(r"frame for 9.0: \d+ bytes of local memory", complaints[0])


def test_the_library_loads_and_registers(tree, capsys):
    assert cuda_symbols.main([str(ptxas_check.check_dir(tree[0]) / compile_cuda.NAME)]) == 0
    assert "fasttransfer::probe" in capsys.readouterr().out


BUILT = {"cuda": True, "cuda_version": "13.0", "torch": "2.13.0+cpu", "requested": {"cuda": "auto"}}


@pytest.fixture
def cuda_torch(monkeypatch):
    """As a CUDA build of torch says, on a machine with a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_gpu_is_here", lambda: True)


def loading(record: dict) -> tuple[str, list[str]]:
    """(why the CUDA kernels are not there, warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        why = native._load_cuda(record)
    return why, [str(warning.message) for warning in caught]


def test_a_cpu_torch_never_tries(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(native, "_gpu_is_here", lambda: True)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it tried"))
    assert loading(BUILT) == (f"built with CUDA 13.0, but torch {torch.__version__} has no CUDA", [])
    assert loading(BUILT | {"cuda": False, "cuda_reason": "because"}) == ("because", [])


@pytest.mark.skipif(torch.version.cuda is not None, reason="in a CUDA build of torch it does load")
def test_a_library_that_does_not_load_is_reported(tree, cuda_torch, monkeypatch):
    """In a CPU build of torch the stream symbol is missing."""
    monkeypatch.setattr(native, "_cuda_file", ptxas_check.check_dir(tree[0]) / compile_cuda.NAME)
    why, warned = loading(BUILT)
    assert "it does not load: " in why
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in why
    assert warned == [f"fasttransfer runs in pure torch on the GPU, without its CUDA kernels: {why}"]


def test_a_library_that_is_gone_is_reported(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_cuda_file", tmp_path / compile_cuda.NAME)
    why, warned = loading(BUILT)
    assert "No such file" in why
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("requested", "gpu", "warns"), [("auto", True, True), ("auto", False, False), ("0", True, False)]
)
def test_a_gpu_that_is_left_to_pure_torch_is_said(requested, gpu, warns, cuda_torch, monkeypatch):
    monkeypatch.setattr(native, "_gpu_is_here", lambda: gpu)
    record = {"cuda": False, "cuda_reason": "nvcc was not found", "requested": {"cuda": requested}}
    why, warned = loading(record)
    assert why == "nvcc was not found"
    assert [text.endswith("without its CUDA kernels: nvcc was not found") for text in warned] == [
        True
    ] * warns


@pytest.mark.parametrize(("driver", "loads"), [(12080, False), (13000, True), (14010, True)])
def test_a_driver_that_is_too_old_is_said(driver, loads, cuda_torch, monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = driver
            return 0

    loaded = []
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    why, warned = loading(BUILT)
    assert loaded == [str(native._cuda_file)] * loads
    assert (not why) is loads
    assert ("the driver here is for CUDA 12.8" in why) is not loads
    assert len(warned) == (not loads)


def test_build_info_names_the_cuda_part():
    info = fasttransfer.build_info()
    assert info["cuda_kernels"] is (info["cuda_reason"] == "loaded")
    assert info["built_with"]["cuda_version"] == installed_record().get("cuda_version")
