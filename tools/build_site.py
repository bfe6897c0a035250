"""Build the documentation into site/, and fail on anything that a reader could stumble over.

    make docs

Warnings of the builder are errors; so are those of griffe, which reads the docstrings and does not count for the
builder; so is what `check_site` finds in the pages that came out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import check_site

ROOT = Path(__file__).parents[1]


def main() -> None:
    zensical = Path(sys.executable).with_name("zensical")
    built = subprocess.run(
        [zensical, "build", "--clean", "--strict"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(built.stdout, end="")
    complaints = re.findall(r"^griffe: .*|^WARNING.*", built.stdout, re.MULTILINE)
    found = check_site.problems(ROOT / "site")
    print(*found, sep="\n", file=sys.stderr)
    print(f"{len(list((ROOT / 'site').rglob('*.html')))} pages, {len(complaints) + len(found)} problems")
    sys.exit(1 if built.returncode or complaints or found else 0)


if __name__ == "__main__":
    main()
