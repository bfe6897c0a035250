"""The log of a load, in three lines."""

from __future__ import annotations

from collections import Counter

from ...streaming.meter import Meter, Stages
from ...streaming.stream import Tally
from ...text import human_bytes, printable
from .survey import Survey

_MAX_REASONS = 6


def describe(found: Survey, stages: Stages, tally: Tally, meter: Meter) -> list[str]:
    """Three lines: how much became what; what stayed and why; seconds, speed, and memory over the model at the peak."""
    plan = found.plan
    scheme, quantized = plan.recipe.scheme, plan.quantized
    became = (
        f"{found.layers:,} layers ({len(quantized):,} tensors) became {scheme}, "
        f"{human_bytes(plan.source_bytes)} -> {human_bytes(plan.final_bytes())}"
    )
    if not quantized:
        became = "no tensor became FP8"
    reasons = Counter(placement.reason for placement in plan.kept)
    stayed = [f"{count:,} {reason}" for reason, count in reasons.most_common(_MAX_REASONS)]
    if len(reasons) > _MAX_REASONS:
        stayed.append(f"and {len(reasons) - _MAX_REASONS} other reasons")
    unread = f"; not read: {len(found.unread):,} ({found.unread[0]}, ...)" if found.unread else ""
    samples, on_device = meter.samples, any(device != "cpu" for device in plan.devices)
    held = [sample.device_bytes if on_device else sample.rss_bytes for sample in samples]
    stream_s = stages.seconds["stream"]
    lines = [
        became,
        f"stayed as they were: {'; '.join(stayed) or 'none'}{unread}",
        f"{sum(stages.seconds.values()):.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in stages.seconds.items())}), "
        f"{tally.read_bytes / stream_s / 1e9:.2f} GB/s, peak {human_bytes(max(0, max(held) - held[-1]))} over final",
    ]
    return [printable(line) for line in lines]
