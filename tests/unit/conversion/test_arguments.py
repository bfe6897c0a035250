"""What configs of compressed-tensors say of weights."""

from __future__ import annotations

import pytest

from octavo.conversion.formats import whole_config


@pytest.mark.parametrize(("format", "group_size"), [("compressed-tensors", -1), ("compressed-tensors-w8a8", None)])
def test_whole_rows_have_a_group_size_where_weights_alone_are_quantized(format: str, group_size: int | None) -> None:
    """vLLM 0.24 refuses experts in packed int8 without it."""
    group = whole_config("int8_channel", format)["config_groups"]["group_0"]
    assert group["weights"].get("group_size") == group_size
    assert group["weights"]["strategy"] == "channel"
