"""``python -m octavo``: the command line."""

from .cli import main

main()
