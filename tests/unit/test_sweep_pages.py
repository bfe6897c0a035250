"""What the pages of model types and of vLLM's architectures say of a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from measured import models, results, vllm_models

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


def of_vllm(name: str, *, online: bool, block: str = "right", why: str = "") -> dict[str, object]:
    """What a sweep says of one architecture in both schemes, of which `fp8_channel` is right."""
    stages = {"online": {"status": "right", "loads": online, "why": "no kernel"}}
    convert = {"status": "declined" if name == "A" else "right"}
    right = {"status": "right", "stages": {**stages, "load": {"status": "right"}, "convert": convert}}
    other = {"status": block, "stages": {**stages, "load": {"status": block, **({"why": why} if why else {})}}}
    schemes = {"fp8_channel": right, "fp8_block": other}
    return {"case": f"x/{name}", "kind": "text", "status": block, "schemes": schemes}


def test_each_scheme_counts_for_itself_beside_what_stock_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = [
        of_vllm("A", online=True),
        of_vllm("B", online=True, block="refused", why="a stack"),
        of_vllm("C", online=False),
    ]
    unbuilt = {"case": "x/D", "kind": "text", "status": "not built", "schemes": {}, "why": "stock vLLM: no"}
    lines = [{"vllm": "1.0", "transformers": "5", "registered": 9}, *cases, unbuilt]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "vllm-1.0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(vllm_models, "RESULTS", tmp_path)
    page = vllm_models.make()
    assert "| all | 4 | 1 | 3 | 0 | 0 | 1 | 2 | 1 | 0 | 0 |" in page
    assert (
        "loads 4 of 6 architectures and schemes that were built. Of these, octavo does not load `B` (fp8_block)."
        in page
    )
    assert "| `B` | `fp8_block` | refused | load: a stack |" in page
    assert "| `D` | stock vLLM: no |" in page
