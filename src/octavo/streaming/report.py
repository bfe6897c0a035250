"""The report of a load or a conversion: bytes, seconds a stage, memory over time, what stayed and why.

As a table for people, a dict for machines, and a plot in which the FP8 curve rises under the line of the bf16 model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..text import count_text, human_bytes, table_text
from .meter import Meter, Sample, Stages

if TYPE_CHECKING:
    from ..planning.budget import Budget
    from ..planning.placement import Placement
    from ..planning.plan import Plan
    from .stream import Tally


# -- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One run, measured. Sizes are in bytes, times in seconds."""

    source: str
    source_bytes: int  # of the same tensors, unquantized
    final_bytes: int  # of parameters, scales and buffers
    in_memory: bool  # whether the result is held in memory (a model) or on disk (a conversion)
    staging_bytes: int  # what the ring and its scratch took
    peak_bytes: int  # tracked: what is held, and staging
    rss_final_bytes: int  # of the process, over its size before the first parameter was allocated
    rss_peak_bytes: int
    device_peak_bytes: int  # of all accelerators together; 0 on a CPU
    devices: Mapping[str, Mapping[str, int]]  # accelerator -> final_bytes, of what it holds, and peak_bytes
    read_bytes: int
    seconds: Mapping[str, float]  # by stage
    read_thread_s: float  # reading, summed over threads
    quantize_thread_s: float  # quantizing and placing, summed over threads
    threads: int
    quantized: Mapping[str, tuple[int, int]]  # scheme -> tensors, bytes
    passed_through: Mapping[str, tuple[int, int]]  # of these, what a quantized source has as it is: likewise
    kept: Mapping[str, tuple[int, int]]  # reason -> tensors, bytes
    unused: Mapping[str, str]  # checkpoint tensors that nothing needed -> why
    notes: Sequence[str] = ()  # what users should know about the result
    trace: Sequence[Sample] = field(repr=False, default=())

    @classmethod
    def of(
        cls,
        plan: Plan,
        budget: Budget,
        tally: Tally,
        stages: Stages,
        meter: Meter,
        *,
        in_memory: bool = True,
        notes: Sequence[str] = (),
    ) -> Report:
        """Gather the report of one run."""
        held_bytes = plan.final_bytes() if in_memory else 0
        final = {device: plan.final_bytes(device) if in_memory else 0 for device in meter.peaks}
        return cls(
            source=plan.source,
            source_bytes=plan.source_bytes,
            final_bytes=plan.final_bytes(),
            in_memory=in_memory,
            staging_bytes=budget.staging_bytes,
            peak_bytes=held_bytes + budget.staging_bytes,
            rss_final_bytes=meter.samples[-1].rss_bytes,
            rss_peak_bytes=max(sample.rss_bytes for sample in meter.samples),
            device_peak_bytes=max(sample.device_bytes for sample in meter.samples),
            devices={d: {"final_bytes": final[d], "peak_bytes": peak} for d, peak in meter.peaks.items()},
            read_bytes=tally.read_bytes,
            seconds=dict(stages.seconds),
            read_thread_s=tally.read_s,
            quantize_thread_s=tally.quantize_s,
            threads=budget.threads,
            quantized=_grouped(plan.quantized, lambda p: p.scheme or ""),
            passed_through=_grouped([p for p in plan.quantized if p.passed], lambda p: p.scheme or ""),
            kept=_grouped(plan.kept, lambda p: p.reason),
            unused=dict(plan.unused),
            notes=tuple(notes),
            trace=tuple(meter.samples),
        )

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def read_gb_per_s(self) -> float:
        """Source bytes a second of the streaming stage, in GB (1e9)."""
        stream_s = self.seconds.get("stream", 0.0)
        return self.read_bytes / stream_s / 1e9 if stream_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        result = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "trace"}
        result.update(total_s=self.total_s, read_gb_per_s=self.read_gb_per_s)
        for name in ("quantized", "passed_through", "kept"):
            result[name] = {key: {"tensors": n, "bytes": b} for key, (n, b) in result[name].items()}
        result["trace"] = [[s.at_s, s.placed_bytes, s.rss_bytes, s.device_bytes] for s in self.trace]
        return result

    def table(self) -> str:
        """The report for people."""
        rows = [
            ("unquantized", human_bytes(self.source_bytes)),
            ("final", f"{human_bytes(self.final_bytes)} ({self.final_bytes / max(self.source_bytes, 1):.0%})"),
            ("staging", f"{human_bytes(self.staging_bytes)}, {self.threads} threads"),
        ]
        if self.in_memory:
            over = max(0, self.rss_peak_bytes - self.final_bytes)  # what it grew by, beyond the model
            rows.append(("process, peak over final", human_bytes(over)))
        else:
            rows.append(("process, peak over start", human_bytes(self.rss_peak_bytes)))
        for name, held in self.devices.items():
            over = max(0, held["peak_bytes"] - held["final_bytes"])
            rows.append((f"{name}, peak over final", f"{human_bytes(over)} over {human_bytes(held['final_bytes'])}"))
        rows.append(("read", f"{human_bytes(self.read_bytes)}, {self.read_gb_per_s:.2f} GB/s"))
        rows.append(("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()) + f": {self.total_s:.2f}"))
        rows += [(f"to {k}", count_text(v)) for k, v in self.quantized.items()]
        rows += [(f"of these, {k} passed through", count_text(v)) for k, v in self.passed_through.items()]
        rows += [(f"kept: {k}", count_text(v)) for k, v in self.kept.items()]
        rows += [("not used", f"{name}: {why}") for name, why in list(self.unused.items())[:5]]
        rows += [("note", note) for note in self.notes]
        return table_text(self.source, {"what": "left", "how much": "left"}, rows, heading=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over time as a PNG.

        Raises:
            MissingExtraError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtraError("plot", "drawing a report") from None
        gib = 1 << 30
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        seconds = [sample.at_s for sample in self.trace]
        axes.axhline(self.source_bytes / gib, color="tab:red", linestyle="--", label="the model, unquantized")
        axes.axhline(self.final_bytes / gib, color="tab:gray", linestyle=":", label="the quantized model")
        axes.plot(
            seconds, [s.placed_bytes / gib for s in self.trace], color="tab:blue", label="quantized bytes in place"
        )
        if self.device_peak_bytes:
            axes.plot(seconds, [s.device_bytes / gib for s in self.trace], color="tab:green", label="device memory")
        else:
            axes.plot(seconds, [s.rss_bytes / gib for s in self.trace], color="tab:green", label="process memory")
        axes.set(xlabel="seconds", ylabel="GiB", title="Memory while loading", ylim=(0, None))
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.92))
        figure.savefig(path, dpi=120)

    def __str__(self) -> str:
        return self.table()


def _grouped(placements: Sequence[Placement], key: Callable[[Placement], str]) -> dict[str, tuple[int, int]]:
    """Key -> the number of placements and their bytes, most bytes first."""
    groups: dict[str, tuple[int, int]] = {}
    for placement in placements:
        count, total = groups.get(key(placement), (0, 0))
        groups[key(placement)] = (count + 1, total + placement.final_bytes)
    return dict(sorted(groups.items(), key=lambda group: -group[1][1]))
