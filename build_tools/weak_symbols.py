"""Check that no SIMD-level object defines a weak symbol: `python -m build_tools.weak_symbols`.

An inline function or template that is not inlined (a standard container, say) becomes a weak symbol in every
object that uses it, and the linker keeps one copy for all. If it keeps the copy from an AVX-512 object, the
baseline path executes AVX-512 instructions: SIGILL on an older CPU, and nothing at all on a newer one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .compile import object_dir

# As nm prints them: W weak function, V weak object, u unique (a static local of an inline function).
# Lower-case w and v are undefined references, which define nothing and are harmless.
WEAK = "WVu"


def weak_symbols(listing: str) -> list[str]:
    """The weak definitions in the output of `nm -C`."""
    found = []
    for line in listing.splitlines():
        address, _, rest = line.partition(" ")
        kind, _, name = rest.partition(" ")
        if address and kind and kind in WEAK:
            found.append(name)
    return found


def level_objects(root: Path) -> list[Path]:
    return sorted(object_dir(root).glob("level*.o"))


def check(objects: list[Path]) -> dict[str, list[str]]:
    """Weak definitions by object file; empty where all is well."""
    problems = {}
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        if weak := weak_symbols(listing):
            problems[path.name] = weak
    return problems


def main() -> int:
    objects = level_objects(Path.cwd())
    if not objects or shutil.which("nm") is None:
        problem = "nm was not found" if objects else "no level objects were built"
        print(f"weak_symbols: cannot check: {problem}")
        return 1
    problems = check(objects)
    for name, symbols in problems.items():
        for symbol in symbols:
            print(f"weak_symbols: {name} defines the weak symbol {symbol}")
    if not problems:
        print(f"weak_symbols: {len(objects)} level objects, no weak symbols")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
