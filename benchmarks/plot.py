"""Pictures of committed results, for the docs.

    python benchmarks/plot.py                           # every results/load_gpu-*, matmul_gpu-*.json -> docs/images/
    python benchmarks/plot.py FILE... --into FOLDER

Of loads one picture a model and setting: seconds of the load, memory beyond the final model, and the memory over time
that octavo's report tells of. Of products one picture: how many times as fast as bf16 they are, for each shape.
"""

from __future__ import annotations

import argparse
import json
import operator
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from common import say
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = common.ROOT / "docs" / "images"
MIB, GIB = 1 << 20, 1 << 30
_COLORS = {"octavo": "tab:blue", "ceiling": "lightgray", "peer": "tab:orange"}
_LINES = ("tab:blue", "tab:orange", "tab:green")
_CEILINGS = {
    "copy": "pinned copy",
    "read": "read",
    "read-direct": "read, direct",
    "ring": "read and copy",
    "ring-direct": "read and copy, direct",
}


def _kind(way: str) -> str:
    return "octavo" if way.startswith("octavo") else "ceiling" if way in _CEILINGS else "peer"


def _bars(axes: Axes, values: dict[str, float], title: str, form: str, imports: dict[str, float] | None = None) -> None:
    """Horizontal bars, the first on top; what importing adds to them is pale."""
    names = [
        _CEILINGS.get(way, way.replace("octavo-", "octavo ").replace("transformers-", "transformers "))
        for way in values
    ]
    drawn = axes.barh(names, list(values.values()), color=[_COLORS[_kind(way)] for way in values])
    axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
    if imports:
        axes.barh(
            names,
            list(imports.values()),
            left=list(values.values()),
            color=[_COLORS[_kind(way)] for way in values],
            alpha=0.2,
        )
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _over(row: dict[str, Any]) -> float | None:
    """Peak beyond the end in MiB: as torch counts it, or the driver, which also sees what bypasses torch's allocator.

    (What torch's allocator keeps for later is in use for the driver, also at the end.)
    """
    found = [row["over_bytes"]] if "over_bytes" in row else []
    if "device_peak_bytes" in row:
        found.append(row["device_peak_bytes"] - row["device_final_bytes"])
    return max(found) / MIB if found else None


def _without_imports(row: dict[str, Any]) -> float:
    """The median over processes of a load's seconds less those of its imports, which differ more than the rest."""
    if "steady_s" in row:
        return float(row["steady_s"]["median"])
    return statistics.median(map(operator.sub, row["load_s"]["all"], row["imports_in_load_s"]["all"]))


def _curve(axes: Axes, way: str, row: dict[str, Any]) -> None:
    columns = dict(zip(row["trace"]["columns"], zip(*row["trace"]["rows"], strict=True), strict=True))
    on_device = bool(row["report"]["device_peak_bytes"])
    memory = "device_bytes" if on_device else "rss_bytes"
    axes.axhline(row["report"]["source_bytes"] / GIB, color="tab:red", linestyle="--", label="unquantized")
    axes.axhline(row["report"]["final_bytes"] / GIB, color="tab:gray", linestyle=":", label="FP8")
    axes.plot(columns["at_s"], [b / GIB for b in columns["placed_bytes"]], color="tab:blue", label="FP8 in place")
    axes.plot(
        columns["at_s"],
        [b / GIB for b in columns[memory]],
        color="tab:green",
        label="device memory" if on_device else "process memory",
    )
    axes.set_ylim(0, None)
    axes.set_title(f"{way.replace('-', ' ', 1)}: GiB over seconds", fontsize=10)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def load_picture(model: str, setting: str, facts: str, rows: dict[str, dict[str, Any]]) -> Figure | None:
    """The picture of one model in one setting; None where nothing was measured."""
    good = {
        way: row for way, row in rows.items() if "load_s" in row and way != "context" and "wrong" not in row["check"]
    }
    if not good:
        return None
    imports = {way: row.get("imports_in_load_s", {}).get("median", 0.0) for way, row in good.items()}
    seconds = {way: _without_imports(row) for way, row in good.items()}
    over = {way: value for way, row in good.items() if _kind(way) != "ceiling" and (value := _over(row)) is not None}
    traced = next(((way, row) for way, row in good.items() if row.get("trace", {}).get("rows")), None)
    panels = 1 + bool(over) + bool(traced)
    figure = Figure(figsize=(5 * panels, 0.6 + 0.3 * max(6, len(seconds))), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _bars(next(axes), seconds, "seconds to load; pale: importing the model's code", "%.2f", imports)
    if over:
        _bars(next(axes), over, "device memory at the peak, MiB over the end", "%.0f")
    if traced:
        _curve(next(axes), *traced)
    figure.suptitle(f"{model}, {setting}: {facts}", fontsize=10)
    return figure


def products_picture(content: dict[str, Any]) -> Figure:
    """How many times as fast as bf16, over rows of activations: as CUDA graphs, and launched one by one (pale)."""
    results, versions = content["results"], content["versions"]
    figure = Figure(figsize=(10, 3 * -(-len(results) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(results) // 3), 3, squeeze=False, sharey=True)
    for axes in grid.flat[len(results) :]:
        axes.remove()
    for axes, (name, counts) in zip(grid.flat, results.items(), strict=False):
        rows = [int(count) for count in counts]
        for key, style in (("graph_us", {}), ("eager_us", {"alpha": 0.3, "linestyle": "--"})):
            for color, scheme in zip(_LINES, ("fp8_channel", "fp8_block", "mxfp8"), strict=True):
                times = [ways["bf16"][key] / ways[scheme][key] for ways in counts.values()]
                axes.plot(rows, times, color=color, marker=".", label=scheme if not style else None, **style)
        axes.axhline(1, color="tab:gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, list(counts))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("rows")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("times as fast as bf16")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    where = f"{content['gpu']}, torch {versions['torch']}; as CUDA graphs, and (pale) launched one by one"
    figure.suptitle(where, fontsize=10)
    return figure


def pictures(stem: str, content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """All pictures of a result file, with the names of theirs."""
    if content["benchmark"] == "matmul_gpu":
        yield stem, products_picture(content)
    for model, found in content.get("models", {}).items():
        for setting, rows in found.get("settings", {}).items():
            machine = content["runs"][next(iter(rows.values()))["run"]]["machine"]
            size = f"{found['checkpoint']['bytes'] / 1e9:.1f} GB on {machine.get('gpu', machine['cpu'])}"
            if figure := load_picture(model, setting, size, rows):
                yield re.sub(r"\W+", "-", f"{stem} {model} {setting}"), figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [path for name in ("load_gpu", "matmul_gpu") for path in sorted(common.RESULTS.glob(f"{name}-*.json"))]
    parser.add_argument("files", nargs="*", type=Path, default=default)
    parser.add_argument("--into", type=Path, default=IMAGES, help="(%(default)s)")
    args = parser.parse_args()
    drawn = []
    for path in args.files:
        content = json.loads(path.read_text())
        for name, figure in pictures(path.stem, content):
            args.into.mkdir(parents=True, exist_ok=True)
            figure.savefig(args.into / f"{name}.png", dpi=110)
            drawn.append(f"{name}.png")
            say(f"drew {args.into / name}.png")
    print(json.dumps({"drawn": drawn}))


if __name__ == "__main__":
    main()
