"""The page of conversions, beside llm-compressor's."""

from __future__ import annotations

from .results import Sources, each, load, page, table

_WAYS = {
    "octavo": "octavo, synced to disk",
    "octavo_without_sync": "octavo, not synced",
    "peer": "llm-compressor's `model_free_ptq`, not synced",
}


def make() -> str:
    """The page."""
    parts = [
        """```sh
make bench B=convert ARGS="--make-peer PEER_VENV"
```

A checkpoint in the shapes of Llama-3-8B, cut to fewer layers, in the page cache. Every run is a process of its own, and
octavo and its peer take turns; the median is given, and the least and the largest value behind it. *Seconds* are those
of the call; octavo syncs what it writes before it gives it its name, and the peer leaves that to the kernel (*flush* is
what the kernel still needed afterwards)."""
    ]
    for result in load("convert"):
        lines = []
        for scheme, ways in result["schemes"].items():
            for way, name in _WAYS.items():
                if way in ways:
                    row = ways[way]
                    peak = f"{row['peak_rss_bytes']['median'] / 1e6:,.0f} MB"
                    lines.append((f"`{scheme}`", name, each(row["call_s"]), each(row["flush_s"]), peak))
        facts, limits = result["checkpoint"], result["ceilings"]
        peer = ", ".join(f"{name} {version}" for name, version in result["peer"].items())
        parts += [
            f"{facts['bytes'] / 1e9:.2f} GB of bf16 in {facts['tensors']} tensors and {facts['shards']} shards.",
            table(("scheme", "", "seconds", "flush", "peak memory"), lines, numbers_from=2),
            f"""In the same run, this machine read the source from its page cache at {limits["read_gb_per_s"]:.1f} GB/s,
copied half of it to a new file in {limits["copy_half_s"]:.1f} s ({limits["copy_half_synced_s"]:.1f} s when synced), and
quantized in memory, with {result["threads"]} threads, {limits["quantize_gb_per_s"]["fp8_channel"]:.1f} GB/s to
`fp8_channel`. That copy goes through the page cache; octavo writes past it, and is done sooner.""",
            Sources(result).note(more=f"the peer with {peer}"),
        ]
    return page("Converting", *parts)
