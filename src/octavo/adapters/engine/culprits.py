"""Dry runs that end at a tensor which the loader does not take, and which tensor that is.

It need not be the last one that the loader was given: some gather, sort or group tensors before they load them. So the
loader is asked again: without the tensor that its error quotes, then without the last one, then with fewer and fewer of
the first ones, until it does not fail in this way any more.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...elements.dry_run import Source, Trace, trace

Loader = Callable[[Iterator[tuple[str, Tensor]]], Any]


def trace_to_culprit(model: nn.Module, load: Loader, sources: Iterable[Source]) -> Trace:
    """`octavo.elements.dry_run.trace`, with the tensor in ``Trace.failed`` for which the loader fails."""
    given = list(sources)
    seen = trace(model, load, given)
    if seen.failed is None:
        return seen
    last, error = seen.failed
    names = [source.name for source in given]
    taken = names.index(last) + 1 if last else 0

    def fails(some: Sequence[Source]) -> bool:
        """Return True if the loader fails in the same way when it is given these alone."""
        failed = trace(model, load, some).failed
        return failed is not None and (type(failed[1]), str(failed[1])) == (type(error), str(error))

    quoted = _quoted(error, names)
    if quoted is not None and quoted != last and fails([source for source in given[:taken] if source.name != quoted]):
        quoted = None
    if quoted is None and taken > 1 and fails(given[: taken - 1]):
        taken = bisect.bisect_left(range(taken), True, key=lambda count: fails(given[:count]))
    seen.failed = (quoted or (names[taken - 1] if taken else ""), error)
    return seen


def _quoted(error: Exception, names: Iterable[str]) -> str | None:
    """The tensor that an error names, in whole or by the end of its name."""
    quoted = re.search(r"'([\w.]+)'", str(error))
    if quoted is None or "." not in quoted[1]:
        return None
    named = [name for name in names if f".{name}".endswith(f".{quoted[1]}")]
    return named[0] if len(named) == 1 else None
