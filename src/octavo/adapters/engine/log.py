"""The log of a load: two lines before a byte is read, with a warning where too little becomes FP8; one at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ...planning import kinds
from ...planning.coded import requantized
from ...planning.placement import Placement
from ...planning.plan import Plan
from ...streaming.meter import Meter, Stages
from ...streaming.stream import Tally
from ...text import human_bytes, printable
from .survey import Survey

_MAX_REASONS = 6
#: so much of the bytes that are read may stay for reasons that nobody chose
_TENTH = 0.1


def outcome(found: Survey) -> list[str]:
    """How much becomes what; what stays, in bytes of this process, and why."""
    plan, quantized = found.plan, found.plan.quantized
    became = f"no tensor became {plan.recipe.scheme}"
    if quantized:
        in_fp8 = sum(placement.final_bytes for placement in _held(found) if placement.scheme)
        became = (
            f"{found.layers:,} layers ({len(quantized):,} tensors) became {plan.recipe.scheme}, "
            f"{human_bytes(in_fp8)}; of all, {human_bytes(plan.source_bytes)} -> {human_bytes(plan.final_bytes())}"
        )
    counts = Counter(placement.reason for placement in plan.kept)
    sizes = _left(found)
    stayed = [f"{counts[reason]:,} {reason} ({human_bytes(size)})" for reason, size in sizes.most_common(_MAX_REASONS)]
    if len(sizes) > _MAX_REASONS:
        stayed.append(f"and {len(sizes) - _MAX_REASONS} other reasons")
    unread = f"; not read: {len(found.unread):,} ({found.unread[0]}, ...)" if found.unread else ""
    stay = f"stayed as they were, {human_bytes(sizes.total())}: {'; '.join(stayed) or 'none'}{unread}"
    return [printable(line) for line in (became, stay)]


def warning(found: Survey) -> str | None:
    """What to warn of: more than a tenth of the bytes stays, and is neither kept by default nor ignored by the user."""
    total = sum(placement.source_bytes for placement in _held(found))
    odd = Counter({reason: size for reason, size in _left(found).items() if not _is_chosen(reason)})
    if found.plan.quantized and odd.total() <= total * _TENTH:
        return None
    said = "; ".join(f"{human_bytes(size)}: {reason}" for reason, size in odd.most_common(3)) or "it has no such layers"
    how_much = (
        f"{human_bytes(odd.total())} of {human_bytes(total)}"
        if found.plan.quantized
        else f"nothing in {found.plan.recipe.scheme}: all"
    )
    return printable(f"{how_much} stays unquantized ({said})")


def notes(plan: Plan, offered: Collection[str]) -> list[str]:
    """Remarks on the checkpoint, and on what is rounded a second time by one of the schemes that an engine has."""
    return [*plan.remarks, *requantized(plan.placements, offered)]


def figures(plan: Plan, stages: Stages, tally: Tally, meter: Meter) -> str:
    """Seconds, speed, and memory over the model at the peak."""
    samples, on_device = meter.samples, any(device != "cpu" for device in plan.devices)
    held = [sample.device_bytes if on_device else sample.rss_bytes for sample in samples]
    return printable(
        f"{sum(stages.seconds.values()):.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in stages.seconds.items())}), "
        f"{tally.read_bytes / stages.seconds['stream'] / 1e9:.2f} GB/s, "
        f"peak {human_bytes(max(0, max(held) - held[-1]))} over final"
    )


def _held(found: Survey) -> list[Placement]:
    """What this process holds, of which a rank has only parts of tensors."""
    assert found.places is not None
    return [*found.places.direct.placements, *found.places.rest.placements]


def _left(found: Survey) -> Counter[str]:
    """Reason -> bytes that stay."""
    sizes: Counter[str] = Counter()
    for placement in _held(found):
        if placement.scheme is None:
            sizes[placement.reason] += placement.source_bytes
    return sizes


def _is_chosen(reason: str) -> bool:
    """By the user, or by what weights of this kind are good for."""
    return reason.endswith("kept by default") or reason.startswith("ignored by") or reason in kinds.BY_DEFAULT
