"""Words for people: bytes, and tables as text."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """12345678 -> '11.77 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError
