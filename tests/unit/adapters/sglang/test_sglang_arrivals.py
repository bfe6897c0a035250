"""Which tensors belong to one update, where nothing but what comes tells where it begins."""

from __future__ import annotations

import pytest
from torch import nn

from octavo.adapters.sglang.arrivals import Arrivals
from octavo.adapters.sglang.forms import Forms
from octavo.errors import CoverageError

FILLERS = {"0": {name: frozenset({"weight"}) for name in ("gate", "up")}, "1": {"down": frozenset({"weight"})}}


def arrivals() -> Arrivals:
    """Of a model of two layers, of which two tensors fill the first."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    return Arrivals(model, FILLERS, Forms(model, FILLERS, lambda method: False))


def send(to: Arrivals, version: str | None, *names: str) -> None:
    to.version = version
    for name in names:
        to.add(name)


def test_all_that_comes_of_a_version_counts_whatever_came_of_the_one_before() -> None:
    found = arrivals()
    send(found, "1", "down", "gate")
    send(found, "2", "up", "down", "gate")
    assert [sorted(layer.came) for layer in found.layers] == [["gate", "up"], ["down"]]


@pytest.mark.parametrize("versions", [("1", "1"), ("1", None), (None, "1"), (None, None)])
def test_a_tensor_that_comes_again_begins_another_update_unless_versions_tell(
    versions: tuple[str | None, str | None],
) -> None:
    found = arrivals()
    send(found, versions[0], "down", "gate")
    send(found, versions[1], "down", "up")
    assert [sorted(layer.came) for layer in found.layers] == [["up"], ["down"]]
    with pytest.raises(CoverageError, match="down came twice"):
        found.check_complete()
