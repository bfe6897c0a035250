"""Code blocks of README and of the documentation, as Markdown has them.

A block that can't run just anywhere says so in its title, which readers see: ``python title="needs a GPU"``.
"""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
_NEEDS = re.compile(r'title="(needs [^"]+)"')
_FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    language: str
    code: str
    needs: str | None  # what it needs and a test does not have

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README and all pages, as paths from the repository's root."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    return [str(path.relative_to(ROOT)) for path in found]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text()
    found = []
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            assert token.map is not None
            language, _, options = token.info.partition(" ")
            needs = _NEEDS.search(options)
            found.append(Block(page, token.map[0] + 2, language, token.content, needs[1] if needs else None))
    # a block within a note or a list that is not indented as Markdown wants would be passed over
    assert len(_FENCE.findall(text)) == 2 * len(found), f"{page}: a code block that is not found as one"
    return found


def docstring_blocks(name: str, docstring: str) -> list[Block]:
    """The Python in a docstring: fenced, as a session (``>>>``), or indented and about octavo."""
    # what stands in a section of examples is indented once more
    text = re.sub(r"(?<=^Example:\n)\n?(?= )|(?<=^Examples:\n)\n?(?= )", "\n", inspect.cleandoc(docstring), flags=re.M)
    found = []
    for token in MarkdownIt("commonmark").parse(text):
        code = token.content
        if ">>>" in code:
            if token.type in ("fence", "code_block", "inline"):
                code = "".join(example.source for example in doctest.DocTestParser().get_examples(code))
                found.append(Block(name, 1, "python", code, None))
        elif (token.type == "fence" and token.info == "python") or (token.type == "code_block" and "octavo." in code):
            found.append(Block(name, 1, "python", code, None))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and variables set before it."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words
