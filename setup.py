"""Build fasttransfer: the Python package and, where it can, its native libraries (`_C`: CPU, `_cuda.so`: CUDA).

Metadata is in pyproject.toml. The environment decides what is compiled:

    FASTTRANSFER_NATIVE=auto|0|1   CPU kernels: where possible, never, or fail without
    FASTTRANSFER_CUDA=auto|0|1     CUDA kernels: where nvcc and a CUDA torch are found, never, or fail without nvcc
    TORCH_CUDA_ARCH_LIST           the GPUs to compile them for, as torch reads it ("8.0;9.0+PTX"); default: all
    CUDA_HOME                      where nvcc is
    FASTTRANSFER_DEBUG=1           -O1 -g, symbols kept
    FASTTRANSFER_LOCAL_VERSION=cu128  the version is 0.1.0+cu128: a wheel that differs from the one on PyPI says so
    CXX, MAX_JOBS                  the compiler, and how many of it run at once

What was decided, and why, goes to stderr and into `fasttransfer/_build.json`, where
`fasttransfer.build_info()` finds it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build front ends run this file without its folder on the path

from build_tools import compile as native  # noqa: E402
from build_tools import compile_cuda as cuda  # noqa: E402
from build_tools.decide import BuildError, decide, describe, local_version  # noqa: E402
from build_tools.ninja_file import install, jobs  # noqa: E402

PACKAGE = ROOT / "fasttransfer"
CUDA_EXTENSION = "fasttransfer._cuda"


class Build(build):
    """`build` from an empty build/lib (no wheel holds what the source no longer has), then `build_record`."""

    sub_commands = [*build.sub_commands, ("build_record", None)]

    def run(self):
        if Path(self.build_lib).resolve().is_relative_to(ROOT / "build"):  # --build-lib may name any folder
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """`build_ext` with ninja in place of setuptools' compiler, which has one set of flags for all files."""

    def get_ext_filename(self, fullname):
        """The CUDA library belongs to no version of Python, and its name says so."""
        *packages, name = fullname.split(".")  # setuptools asks with and without the package
        if name == CUDA_EXTENSION.rpartition(".")[2]:
            return os.path.join(*packages, cuda.NAME)
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        facts = PLAN.facts
        try:
            if ext.name == CUDA_EXTENSION:
                library = cuda.build_library(ROOT, facts.nvcc, facts.torch, PLAN.architectures, os.environ)
            else:
                library = native.build_library(ROOT, facts.compiler, facts.torch, os.environ)
        except BuildError as error:
            raise SystemExit(f"error: {error}") from None
        install(library, target)


class BuildRecord(Command):
    """Say what was decided, and write it into `_build.json` beside the package's modules."""

    description = "record what was compiled and why"
    user_options = []

    def initialize_options(self):
        self.editable_mode = False
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if self.editable_mode:
            # A library of an earlier build would be loaded, or shipped, in spite of this decision.
            for pattern, wanted in (("_C.*.so", PLAN.native.build), (cuda.NAME, PLAN.cuda.build)):
                for stale in PACKAGE.glob(pattern) if not wanted else ():
                    stale.unlink()
        version = self.distribution.get_version().partition("+")[0]  # egg_info, later, appends the local part
        record = PLAN.record(version + LOCAL_VERSION)
        target = Path(self.get_outputs()[0])
        target.write_text(json.dumps(record, indent=2) + "\n")
        print(describe(record), file=sys.stderr)

    def get_source_files(self):
        return []

    def get_outputs(self):
        folder = PACKAGE if self.editable_mode else Path(self.build_lib, "fasttransfer")
        return [str(folder / "_build.json")]

    def get_output_mapping(self):
        return {}


try:
    PLAN = decide(os.environ, ROOT)
    LOCAL_VERSION = local_version(os.environ)
    jobs(os.environ)  # a bad MAX_JOBS is said before anything is built
except BuildError as error:
    raise SystemExit(f"error: {error}") from None

# The sources are listed for tools that read them; what is compiled and how is build_tools/compile*.py.
EXTENSIONS = [
    *([Extension("fasttransfer._C", sources=["csrc/module.cpp"])] if PLAN.native.build else []),
    *([Extension(CUDA_EXTENSION, sources=list(PLAN.facts.cuda_sources))] if PLAN.cuda.build else []),
]

setup(
    ext_modules=EXTENSIONS,
    options={"egg_info": {"tag_build": LOCAL_VERSION}},
    cmdclass={"build": Build, "build_ext": BuildNative, "build_record": BuildRecord},
)
