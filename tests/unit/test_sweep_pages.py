"""What the page of model types says of a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from measured import models, results

CASES = {
    "a/AModel": {"autos": ["AutoModel"], "status": "right"},
    "a/AForCausalLM": {"autos": ["AutoModelForCausalLM", "AutoModelForPreTraining"], "status": "right"},
    "b/BModel": {"autos": ["AutoModel"], "status": "wrong", "why": {"load": "3 kept tensors differ: ['x', 'y']"}},
    "c/CModel": {"autos": ["AutoModel"], "status": "wrong", "why": {"load": "7 kept tensors differ: ['z']"}},
    "d/DModel": {"autos": ["AutoModel"], "status": "not built", "why": {"build": "DModel requires the natten library"}},
}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    facts = {"date": "2026-01-01", "commit": "abc", "versions": {"torch": "2"}}
    machine = {"cpu": "Xeon", "cores": 64, "storage": "tmpfs tmpfs at /dev/shm"}
    content = json.loads(json.dumps({**facts, "machine": machine, "cases": CASES}))
    monkeypatch.setattr(models, "load", lambda name: [results.Result(content, "sweep-x")])
    return models.make()


def test_each_class_counts_for_its_auto_classes_and_once_in_all(page: str) -> None:
    assert "3 of 4 model types were built, with 5 classes." in page
    assert "| all classes | 5 | 4 | 2 | 0 | 2 |" in page
    assert "| `AutoModel` | 4 | 3 | 1 | 0 | 2 |" in page
    assert "| `AutoModelForPreTraining` | 1 | 1 | 1 | 0 | 0 |" in page


def test_every_exception_is_named_with_others_of_its_cause(page: str) -> None:
    assert "| load | some kept tensors differ: … | 2 | `b/BModel`, `c/CModel` |" in page
    assert "| build | it needs natten, which was not installed | 1 | `d/DModel` |" in page
    assert "AForCausalLM" not in page.partition("## Exceptions")[2]
