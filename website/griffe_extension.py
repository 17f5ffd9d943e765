"""The extension of Griffe, which reads the docstrings for mkdocstrings (mkdocs.yml)."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object

from website.docstrings import as_markdown


class PlainMarkdown(Extension):
    """Rewrites every docstring that is collected."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Once per module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
