"""The report of a session: each layer's way, its time and memory; and events in order, for those who want proof."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..elements.boxes import Box
from ..text import human_bytes, pattern, printable, some, table_text


class Event(NamedTuple):
    """Something that happened to a layer, in order.

    kind    materialize     a parameter got high-precision storage
            write           a loader wrote a box
            quantize        a box went straight into FP8
            finish          the layer was finished, and its high-precision storage released
    """

    kind: str
    layer: str
    parameter: str = ""
    box: Box | None = None
    source: str = ""

    def __str__(self) -> str:
        """The parameter and the box that it happened to."""
        return f"{self.parameter}{self.box or ''}" + (f", from {self.source}" if self.source else "")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer, finished."""

    name: str
    finish_s: float
    loaded_bytes: int  # as loaded, in high precision
    final_bytes: int
    way: str  # direct (straight into FP8), whole layer, kept (nothing of it is quantized), or function


@dataclass
class LayerwiseReport:
    """Bytes are bytes, times seconds."""

    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # parameter -> why it is not quantized
    notes: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)  # layers that the last update changed
    waiting: list[str] = field(default_factory=list)  # what came and waits for the next call of an update
    taken_bytes: int = 0  # of the tensors that loaders were given
    peak_bytes: int = 0  # of final and high-precision storage that the session held at one time
    total_s: float = 0.0

    @property
    def final_bytes(self) -> int:
        return sum(layer.final_bytes for layer in self.layers)

    @property
    def loaded_bytes(self) -> int:
        return sum(layer.loaded_bytes for layer in self.layers)

    @property
    def finish_s(self) -> float:
        return sum(layer.finish_s for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        totals = {name: getattr(self, name) for name in ("loaded_bytes", "final_bytes", "finish_s")}
        return {**totals, **asdict(self)}

    def table(self) -> str:
        """The report for people."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(pattern(layer.name) or "the model itself", []).append(layer)
        rows = []
        for name, members in groups.items():
            label = name if len(members) == 1 else f"{name} ({len(members)})"
            loaded, final = sum(m.loaded_bytes for m in members), sum(m.final_bytes for m in members)
            way = ", ".join(dict.fromkeys(m.way for m in members))
            finish = f"{sum(m.finish_s for m in members):.3f} s"
            rows.append((label, human_bytes(loaded), human_bytes(final), way, finish))
        columns = {"layer": "left", "loaded": "right", "final": "right", "way": "left", "finish": "right"}
        total = (
            f"loaded {human_bytes(self.loaded_bytes)}, final {human_bytes(self.final_bytes)}, peak "
            f"{human_bytes(self.peak_bytes)}; finishing took {self.finish_s:.2f} of {self.total_s:.2f} s"
        )
        told = [f"updated {len(self.updated):,} layer{'s' * (len(self.updated) != 1)}: {some(self.updated)}"]
        told = told if self.updated else []  # which is all that there is of an update of parts of layers
        told += [f"waiting for the next call: {some(self.waiting)}"] if self.waiting else []
        told += [f"note: {note}" for note in self.notes]
        return "\n".join([table_text("layers", columns, rows), total, *map(printable, told)])

    def __str__(self) -> str:
        return self.table()


class Ledger:
    """Events in order, and the bytes that a session holds."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.held_bytes = self.peak_bytes = self.taken_bytes = 0

    def event(self, event: Event) -> None:
        self.events.append(event)

    def hold(self, nbytes: int) -> None:
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
