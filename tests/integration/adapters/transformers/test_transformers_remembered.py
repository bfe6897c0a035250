"""A plan that an earlier load has made is used by the next one like it, and by no other."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _models import KINDS, Checkpoints, make_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

import octavo
from helpers.models import differences
from octavo.adapters.remembering import entries
from octavo.adapters.transformers import remembered
from octavo.adapters.transformers.remembered import REMEMBERED
from octavo.errors import CoverageError, DeviceError, RecipeError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of plans, which is not there yet."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "source")


def used(model: Any) -> bool:
    return REMEMBERED in model.load_report.notes


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("scheme", [None, "fp8_channel", "fp8_block"])
def test_the_second_load_uses_the_plan_of_the_first(
    architecture: str, scheme: str | None, checkpoints: Checkpoints, cache: Path
) -> None:
    folder = checkpoints.folder(architecture)
    first, second = octavo.load(folder, scheme), octavo.load(folder, scheme)
    assert (used(first), used(second)) == (False, True)
    assert differences(first, second) == []
    mine, theirs = first.load_report.to_dict(), second.load_report.to_dict()
    for told in ("source_bytes", "final_bytes", "read_bytes", "quantized", "kept", "unused"):
        assert mine[told] == theirs[told]
    assert first.load_routes == second.load_routes
    assert [path.stat().st_mode & 0o777 for path in (cache, *cache.iterdir())] == [0o700, 0o600]


def test_plans_are_equal_and_print_alike(source: Path) -> None:
    first, second = octavo.plan(source, model=True), octavo.plan(source, model=True)
    assert first == second
    assert str(first) == str(second)
    assert used(octavo.load(source))


def test_another_process_uses_it(source: Path) -> None:
    code = "import sys, octavo; print(octavo.load(sys.argv[1]).load_report.notes)"
    octavo.load(source)
    assert REMEMBERED in subprocess.check_output([sys.executable, "-c", code, source], text=True)


def _in_two_orders() -> tuple[set[str], set[str]]:
    """A set, and an equal one in another order, as another process may have it."""
    for first, second in itertools.combinations(map(str, range(100)), 2):
        one, other = {first, second}, {second, first}
        if [*one] != [*other]:
            return one, other
    raise AssertionError("no two strings have hashes that collide")


@pytest.mark.parametrize("attribute", ["_keys_to_ignore_on_load_unexpected", "_keep_in_fp32_modules_strict"])
def test_the_order_of_sets_makes_no_other_plan(attribute: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, found = transformers.Qwen3MoeForCausalLM, []
    original = kind.post_init
    for names in _in_two_orders():

        def post_init(model: Any, names: set[str] = names) -> None:
            original(model)
            setattr(model, attribute, names)

        monkeypatch.setattr(kind, "post_init", post_init)
        found.append(used(octavo.load(source)))
    assert found == [False, True]


def test_device_place_and_staging_are_not_what_a_plan_depends_on(source: Path, tmp_path: Path) -> None:
    octavo.plan(source, device="cuda:3", model=True, staging_bytes=1 << 25)
    moved = source.rename(tmp_path / "moved")
    second = octavo.load(moved)
    assert used(second)
    assert second.load_report.source == str(moved)
    assert {parameter.device.type for parameter in second.parameters()} == {"cpu"}


def test_from_pretrained_has_plans_of_its_own(source: Path, cache: Path) -> None:
    def load() -> Any:
        config = octavo.OctavoConfig("fp8_channel")
        return transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)

    first, second = load(), load()
    assert (used(first), used(second)) == (False, True)
    assert differences(first, second) == []
    assert not used(octavo.load(source, "fp8_channel"))  # which is strict


def test_what_was_saved_quantized_is_remembered_too(source: Path, tmp_path: Path) -> None:
    octavo.load(source).save_pretrained(tmp_path / "saved")
    first, second = octavo.load(tmp_path / "saved"), octavo.load(tmp_path / "saved")
    assert (used(first), used(second)) == (False, True)
    assert differences(first, second) == []


def test_new_weights_with_the_same_headers_are_those_that_are_read(source: Path) -> None:
    octavo.load(source)
    file = source / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) * 2 for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    second = octavo.load(source)
    assert used(second)
    assert torch.equal(second.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


# -- what makes another plan ------------------------------------------------------------------------------------------


def _metadata(source: Path, _: pytest.MonkeyPatch) -> None:
    file = source / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, {"format": "pt", "more": "words"})


def _config(source: Path, _: pytest.MonkeyPatch) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def _register(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping as mapping

    monkeypatch.setattr(mapping, "USER_REGISTERED_MAPPINGS", set(mapping.USER_REGISTERED_MAPPINGS))
    monkeypatch.setattr(
        mapping, "_checkpoint_conversion_mapping_cache", dict(mapping._checkpoint_conversion_mapping_cache)
    )
    mine = [*mapping.get_checkpoint_conversion_mapping("qwen3_moe"), mapping.WeightRenaming("no such", "name")]
    mapping.register_checkpoint_conversion_mapping("qwen3_moe", mine, overwrite=True)


def _patch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

    monkeypatch.setattr(Qwen3MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", ["no such name"])


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "a header": _metadata,
    "a config": _config,
    "a version of transformers": lambda _, patch: patch.setattr(transformers, "__version__", "5.0.0"),
    "a version of octavo": lambda _, patch: patch.setattr(octavo, "__version__", "0"),
    "a mapping that is registered": _register,
    "a model's class that is patched": _patch,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=[*CHANGES])
def test_what_planning_looks_at_makes_another_plan(change: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = octavo.load(source)
    change(source, monkeypatch)
    second = octavo.load(source)
    assert not used(second)
    assert differences(first, second) == []
    assert used(octavo.load(source))


OPTIONS = {
    "a scheme": {"scheme": "fp8_block"},
    "a pattern": {"ignore": ["*.self_attn.*"]},
    "a dtype": {"dtype": "float32"},
    "what is refused": {"strict": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])
def test_options_make_another_plan(options: Any, source: Path) -> None:
    octavo.load(source)
    first, second = octavo.load(source, **options), octavo.load(source, **options)
    assert (used(first), used(second)) == (False, True)
    assert differences(first, second) == []


def test_code_that_compares_names_counts_where_there_is_no_mapping(source: Path) -> None:
    from transformers import core_model_loading

    assert core_model_loading.__file__ in {*remembered._files_of(octavo.load(source), [])}


def test_code_in_no_file_is_asked_each_time(source: Path, cache: Path) -> None:
    base = transformers.Qwen3MoeForCausalLM
    scope: dict[str, Any] = {"base": base, "__name__": "in_no_file"}
    exec("class Qwen3MoeForCausalLM(base): pass", scope)
    for _ in range(2):
        assert not used(octavo.load(source, model_class=scope["Qwen3MoeForCausalLM"]))
    assert not cache.exists()


def test_what_was_wrong_is_wrong_again(source: Path, cache: Path) -> None:
    octavo.load(source)
    for _ in range(2):
        with pytest.raises(RecipeError, match="no_such_weight"):
            octavo.load(source, ignore=["no_such_weight"])
    with safe_open(source / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if "norm" not in name}  # noqa: SIM118
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(CoverageError, match="missing"):
            octavo.load(source)
    assert len([*cache.iterdir()]) == 1


def test_options_are_checked_where_the_plan_is_remembered(source: Path) -> None:
    for _ in range(2):
        octavo.plan(source, model=True)
        with pytest.raises(DeviceError, match="staging_bytes"):
            octavo.plan(source, model=True, staging_bytes=5)


# -- entries that can't be used ---------------------------------------------------------------------------------------


def _checked(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """An entry with other content, and a checksum that is right."""

    def rewrite(file: Path) -> None:
        entries.write(file, change(json.loads(file.read_bytes().partition(b"\n")[2])))

    return rewrite


def _off_by_one(content: Any) -> Any:
    content["placements"][0][-1] += 1
    return content


def _of_another_shape(content: Any) -> Any:
    rows, kinds = content["placements"], content["kinds"]
    kind = next(kind for kind in kinds if len(kind[0]) == 1)
    mine = [row for row in rows if kinds[row[0]] is kind]
    mine[0][1], other = "model.embed_tokens.weight", next(r for r in rows if r[1] == 0 or r[1] == "lm_head.weight")
    other[1] = mine[0][1]
    return content


ODD: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "empty": lambda file: file.write_bytes(b""),
    "writable for others": lambda file: file.chmod(0o666),
    "a list": _checked(lambda content: [content]),
    "without a key": _checked(lambda content: {key: value for key, value in content.items() if key != "unused"}),
    "a parameter less": _checked(lambda content: {**content, "placements": content["placements"][1:]}),
    "a parameter twice": _checked(
        lambda content: {**content, "placements": [*content["placements"], content["placements"][0]]}
    ),
    "a piece outside of its tensor": _checked(_off_by_one),
    "parameters of other shapes": _checked(_of_another_shape),
    "an unknown scheme": _checked(lambda content: {**content, "scheme": "int3"}),
    "remarks that are none": _checked(lambda content: {**content, "remarks": [1]}),
}


@pytest.mark.parametrize("spoil", ODD.values(), ids=[*ODD])
def test_an_odd_entry_is_as_none_and_made_anew(spoil: Any, source: Path, cache: Path) -> None:
    first = octavo.load(source)
    (entry,) = cache.iterdir()
    spoil(entry)
    second = octavo.load(source)
    assert not used(second)
    assert differences(first, second) == []
    assert used(octavo.load(source))


def _read_only(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.mkdir(mode=0o500)


@pytest.mark.parametrize("spoil", [lambda folder: folder.write_text(""), _read_only], ids=["a file", "read-only"])
def test_a_folder_that_cant_be_used_does_no_harm(spoil: Any, source: Path, cache: Path) -> None:
    spoil(cache.parent)
    for _ in range(2):
        assert not used(octavo.load(source))


def test_what_cant_be_written_down_is_planned_each_time(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = remembered.plan_model

    def with_odd_remarks(*args: Any, **options: Any) -> Any:
        return replace(original(*args, **options), remarks=(object(),))

    monkeypatch.setattr(remembered, "plan_model", with_odd_remarks)
    caplog.set_level(logging.INFO)
    assert not used(octavo.load(source))
    assert not cache.exists() or not [*cache.iterdir()]
    assert "the plan can't be remembered: TypeError" in caplog.text


def test_a_user_without_a_home_loads_all_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for _ in range(2):
        assert not used(octavo.load(source))


def test_it_can_be_switched_off(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert not used(octavo.load(source))
    assert not (tmp_path / "home").exists()


def test_a_plan_is_kept_once_for_all_loads_of_the_same(source: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    octavo.load(source)
    (entry,) = cache.iterdir()
    os.utime(entry, (0, 0))
    assert used(octavo.load(tmp_path / "copy"))
    assert [*cache.iterdir()] == [entry]
    assert time.time() - entry.stat().st_mtime < 600  # it was used


def test_transformers_is_not_asked_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    octavo.load(source)
    monkeypatch.delattr(remembered, "plan_model")
    assert used(octavo.load(source))
