"""A process that checks the cases whose names it is sent, one a line, and answers each with a line of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

#: memory that a process may ask for, so that a case can't bring down the machine
_MOST_BYTES = 24 << 30


def main(parent: str) -> None:
    """Work until standard input ends. What others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from .cases import every_case
    from .checks import check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = {case.name: case for case in every_case()}
    for line in sys.stdin:
        result = check(cases[line.strip()], Path(tempfile.mkdtemp(dir=parent)))
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
