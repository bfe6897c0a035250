"""Every fault at every call of every operation, many processes at a time.

    python tests/faults/injector/_injections.py -j 16

The last line of the output is JSON: cases and outcomes of each operation, and every problem. The exit code is 1 where
there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from _cases import FAULTS, OPERATIONS, run_cases  # noqa: E402
from _shim import compiled, why_not  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="where to work")
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS), metavar="OPERATION")
    asked = parser.parse_args()
    if reason := why_not():
        sys.exit(f"no faults can be injected: {reason}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as name, ThreadPoolExecutor(asked.jobs) as pool:
        shim = compiled(Path(name))
        waiting = {
            (operation, f"{kind}:{fault}"): pool.submit(
                run_cases, shim, Path(name) / f"{kind}-{fault}", operation, f"{kind}:{fault}"
            )
            for kind, faults in FAULTS.items()
            for fault in faults
            for operation in asked.operations
        }
        for (operation, fault), future in waiting.items():
            cases = future.result()[1:]
            found += cases
            print(
                f"{operation}, {fault}: {len(cases)} calls, {sum(bool(c['problems']) for c in cases)} wrong", flush=True
            )
    outcomes = {o: dict(Counter(c["outcome"] for c in found if c["operation"] == o)) for o in asked.operations}
    problems = [case for case in found if case["problems"]]
    print(json.dumps({"cases": len(found), "outcomes": outcomes, "problems": problems}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
