"""Formulas of the documentation as MathML, which browsers typeset by themselves: ``$...$`` in a line, ``$$...$$`` alone."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_CODE_OR_FORMULA = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.M | re.S
)


def typeset(markdown: str) -> str:
    """A page's Markdown with its formulas as MathML; what is in code stays."""

    def replaced(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        if found["block"]:
            return convert(found["block"].strip(), display="block")
        return (
            f'<span class="formula">{convert(found["inline"])}</span>'  # a line that began with <math> would be a block
        )

    return _CODE_OR_FORMULA.sub(replaced, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return typeset(markdown)
