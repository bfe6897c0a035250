"""All pages that are made from results."""

from __future__ import annotations

from . import converting, loading, models, products, quality, serving, shares, starting, summary, updating, vllm_models


def make() -> dict[str, str]:
    """Path within docs -> Markdown."""
    return {
        "measured/index.md": summary.make(),
        "measured/loading.md": loading.make(),
        "measured/starting.md": starting.make(),
        "measured/converting.md": converting.make(),
        "measured/updating.md": updating.make(),
        "measured/products.md": products.make(),
        "measured/serving.md": serving.make("vLLM"),
        "measured/serving-sglang.md": serving.make("SGLang"),
        "measured/models.md": models.make(),
        "measured/vllm-models.md": vllm_models.make(),
        "measured/quality.md": quality.make(),
        "measured/shares.md": shares.make(),
    }
