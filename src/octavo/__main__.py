"""The command ``octavo``, and ``python -m octavo``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. An interrupt is one word, also while it is being imported or says its last."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
