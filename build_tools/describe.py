"""Print what the in-place build decided: `python -m build_tools.describe` (pip hides the build's words)."""

import json
from pathlib import Path

from .decide import describe

print(describe(json.loads(Path("fasttransfer/_build.json").read_text())))
