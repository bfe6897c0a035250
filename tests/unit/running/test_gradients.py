"""Whether gradients are asked: of either mode, in eager code and in what is compiled."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from octavo.running.gradients import are_asked


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it, for forward mode
def test_gradients_are_asked_in_either_mode() -> None:
    plain, wanting = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not are_asked(plain, None)
    assert are_asked(plain, wanting)
    with torch.no_grad():
        assert not are_asked(wanting)
        with forward_ad.dual_level():
            assert are_asked(plain)
    asked = []

    def note(x: torch.Tensor) -> torch.Tensor:
        asked.append(are_asked(x))
        return x * 1

    torch.func.jvp(note, (plain,), (plain,))
    torch.func.grad(lambda x: note(x).sum())(plain)
    torch.func.vmap(note)(plain)
    assert asked == [True, True, False]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_asking_is_compiled_without_graph_breaks() -> None:
    compiled = torch.compile(lambda x: x * 2 if are_asked(x) else x, fullgraph=True, backend="eager")
    x = torch.ones(2)
    assert torch.equal(compiled(x), x)
    assert torch.equal(compiled(x.clone().requires_grad_()), x * 2)
    with forward_ad.dual_level():
        assert torch.equal(compiled(x), x * 2)
