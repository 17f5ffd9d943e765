"""Hooks of mkdocs: pages that are files of the repository outside of docs/, the performance pages, links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs loads a hook by its path

from mkdocs.structure.files import File  # noqa: E402

from website import github, performance  # noqa: E402


def on_config(config: Any) -> Any:
    """Name the whole report of each committed result in the navigation."""
    section = next(entry["Performance"] for entry in config.nav if "Performance" in entry)
    section.insert(1, {"Whole reports": [f"performance/{path.stem}.md" for path in performance.in_order()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what is not in docs/."""
    for path, page in github.ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    written = performance.pages(ROOT / "build" / "website")
    for page, markdown in written.texts.items():
        files.append(File.generated(config, page, content=markdown))
    for page, image in written.images.items():
        files.append(File.generated(config, page, abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links, lists and tables as the site needs them."""
    address = page.file.src_uri
    if address.startswith("api/"):
        return markdown
    folder = "" if performance.is_page(address) else str(Path(github.in_repository(address)).parent)
    url = config.repo_url or ""
    return github.rewrite(markdown, address, folder, f"{url.rstrip('/')}/blob/main" if url else "")


def on_serve(server: Any, config: Any, builder: Any) -> Any:
    """`make docs ARGS=serve` also watches what is not in docs/."""
    for path in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "website",
        "benchmarks/results",
    ):
        server.watch(str(ROOT / path))
    return server
