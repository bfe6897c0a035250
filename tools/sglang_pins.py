"""Prints what the installed SGLang requires, as constraints for pip; but for torch, which it wants built for CUDA."""

from __future__ import annotations

import re
from importlib.metadata import requires


def main() -> None:
    for line in requires("sglang") or ():
        requirement, _, marker = line.partition(";")
        if "extra ==" not in marker and not requirement.startswith("torch"):
            print(re.sub(r"\[.*\]", "", requirement))  # a constraint has no extras


if __name__ == "__main__":
    main()
