"""Write the pages of docs/ that are made from something else: from benchmarks' results, and from the command line.

    make pages

They are committed, so that they can be read where the repository is, and a test says when one of them is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import command_line
from measured import pages

DOCS = Path(__file__).parents[1] / "docs"


def make() -> dict[Path, str]:
    """Path -> what belongs there."""
    found = {DOCS / name: text for name, text in pages.make().items()}
    return found | {DOCS / "reference" / "command-line.md": command_line.make()}


def main() -> None:
    for path, text in make().items():
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
