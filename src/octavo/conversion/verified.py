"""What verifying a checkpoint has found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .proof import Judgement


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor of the converted checkpoint against its source."""

    name: str
    scheme: str | None  # None: kept
    differing_bytes: int | None  # of weight and scale; None if it has not its digest, which does not tell how many
    error_db: float | None  # signal-to-noise against the source; None where nothing was quantized, or to FP8
    passed: bool = False  # codes and scales should be those of the source

    @property
    def equal(self) -> bool:
        return self.differing_bytes == 0


@dataclass(frozen=True)
class VerifyReport:
    """All tensors, and what a reader makes of them.

    ``ok`` when every byte is what quantizing the source gives, or what the digests tell, and all is read right.
    """

    tensors: tuple[TensorResult, ...]
    by_digests: bool = False  # no source was read
    judgement: Judgement | None = None  # of a reader, if one was asked

    @property
    def ok(self) -> bool:
        return all(result.equal for result in self.tensors) and (self.judgement is None or self.judgement.ok)

    @property
    def different(self) -> list[TensorResult]:
        return [result for result in self.tensors if not result.equal]

    def lines(self) -> Iterator[str]:
        """What the command line says. Each line is one, whatever names it holds."""
        if self.judgement is not None:
            yield from self.judgement.lines()
            if not self.tensors:
                return
        if self.by_digests:
            yield from (f"{result.name}  not the bytes that were written" for result in self.different)
            verdict = f"DIFFERENT: {len(self.different)} of" if self.different else "all bytes as they were written:"
            yield f"{verdict} {len(self.tensors)} tensors (by their digests; no source was read)"
            return
        for result in self.tensors:
            if result.scheme:
                verdict = "equal" if result.equal else f"{result.differing_bytes:,} bytes differ"
                db = "of another dtype" if result.error_db is None else f"{result.error_db:.2f} dB"
                db = "passed through" if result.passed else db
                yield f"{result.name}  {result.scheme}  {verdict}  {db}"
        kept = [result for result in self.tensors if not result.scheme]
        yield f"kept: {len(kept)} tensors, {sum(not result.equal for result in kept)} of them different"
        yield "all bytes equal" if not self.different else f"DIFFERENT: {len(self.different)} tensors"

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "ok": self.ok,
            "by": "digests" if self.by_digests else "source" if self.tensors else "reader",
            "reader": self.judgement and asdict(self.judgement),
            "tensors": [
                {
                    "name": r.name,
                    "scheme": r.scheme,
                    "equal": r.equal,
                    "differing_bytes": r.differing_bytes,
                    "passed_through": r.passed,
                    "error_db": r.error_db if r.error_db is None or math.isfinite(r.error_db) else None,
                }
                for r in self.tensors
            ],
        }
