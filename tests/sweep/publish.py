"""What a sweep found, as benchmarks/results/sweep-….json, from which docs/measured/models.md is made.

    PYTHONPATH=src:tests:benchmarks python -m sweep.publish sweep.jsonl && make pages

It records the machine that it runs on, which should be that of the sweep; ``--facts`` tells of another one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, circumstances, machine_name, results_path

from .run import read

#: of what was said of a case
_MOST_CHARACTERS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="lines of JSON, as sweep.run writes them")
    parser.add_argument("--facts", type=Path, metavar="JSON", help="date, commit, machine, versions of the sweep")
    parser.add_argument("--out", type=Path, help="where to write it, if not among the committed results")
    asked = parser.parse_args()
    facts = json.loads(asked.facts.read_text()) if asked.facts else circumstances(Path("/dev/shm"))
    for key in [key for key in facts["machine"] if key.startswith("gpu")]:
        del facts["machine"][key]  # it takes no part
    cases = {result["case"]: _short(result) for result in sorted(read(asked.results), key=lambda each: each["case"])}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    text = json.dumps({"benchmark": "sweep", **facts}, indent=1).removesuffix("\n}")
    if not asked.out:
        for old in RESULTS.glob("sweep-*.json"):  # of any machine, since there is one page
            old.unlink()
    path = asked.out or results_path("sweep", facts["machine"])
    path.write_text(f'{text},\n "cases": {{\n{lines}\n }}\n}}\n')
    print(path, machine_name(facts["machine"]))


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a case: how it went, and of each stage that was not right, why."""
    why = {stage: found["why"] for stage, found in result["stages"].items() if found["status"] != "right"}
    if result["status"] != "right" and not why:
        why = {"build": result.get("why", "")}
    short = {stage: " ".join(said.split())[:_MOST_CHARACTERS] for stage, said in why.items()}
    return {"autos": result["autos"], "status": result["status"], **({"why": short} if short else {})}


if __name__ == "__main__":
    main()
