"""The page of error messages quotes messages that octavo really has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text().partition("These are vLLM's own:")[0]
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts(path: Path) -> Iterator[str]:
    """All texts of a module; what a formatted one inserts is left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = "\n".join(text for path in sorted((ROOT / "src").rglob("*.py")) for text in texts(path))


def test_the_page_quotes_messages():
    assert len(QUOTED) > 50


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_octavos(message):
    parts = [re.escape(part) for part in message.split("...") if part]
    assert re.search("[^\n]*".join(parts), TEXTS), "the text has changed: say on the page what it is now"
