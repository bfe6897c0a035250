"""Loads of toy models, one after another: what the first has shown, the second does without asking."""

from __future__ import annotations

import json
import logging
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import random_weights, same_bytes, write_checkpoint
from helpers.vllm_toys import Toy
from octavo.adapters.engine import options
from octavo.adapters.engine.loading import Loading
from octavo.adapters.remembering import entries, facts
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.streaming.meter import Stages

LOG = logging.getLogger("octavo.remembered")
SHAPES = {"gate_proj.weight": (256, 256), "up_proj.weight": (256, 256), "down_proj.weight": (256, 256)}
LAYERS = ("gate_up_proj", "down_proj")
RECALLED = "plan remembered from an earlier start"


class Options(options.Options):
    engine = "toy"


class Engine(Toy):
    """Counts how often it is asked; has a table, and an attribute that loading sets."""

    asked = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("experts", torch.arange(4))

    def load_weights(self, weights: Any) -> None:
        Engine.asked += 1
        super().load_weights(weights)
        self.has_loaded = True


class Layers:
    """As an engine's config: which layers were made unquantized."""

    def __init__(self, kept: Mapping[str, str]) -> None:
        self.kept = dict(kept)

    def paths(self, model: nn.Module) -> dict[str, str]:
        return {name: name for name in LAYERS}

    def unquantized(self, model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        return self.kept, {}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    Engine.asked = 0
    return tmp_path / "cache" / "plans"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {name: random_weights(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    path = write_checkpoint(tmp_path / "bf16", {**tensors, "norm": random_weights((256,), torch.float32, 9)})
    (path / "config.json").write_text('{"model_type": "toy"}')
    return path


def load(
    source: Path,
    depends: str = "",
    down: str = "right",
    kind: type[Engine] = Engine,
    by_plan: Mapping[str, str] | None = None,
    made: list[Any] | None = None,
    calls: Any = str,
    **given: Any,
) -> Any:
    """What an engine does, in which a layer of ``down`` may have to stay, and others because of the plan.

    By what models are made, is added to ``made``.
    """
    checkpoint = Checkpoint.open(source)
    options, _ = Options(threads=1, **given).settled(checkpoint)
    about = (options, formats.get("compressed-tensors"), torch.device("cpu"), LOG, Stages())
    loading = Loading("toy", checkpoint, *about, lambda: depends)

    def make(kept: Mapping[str, str]) -> Engine:
        model = kind(loading.options.scheme, down=down, quantized=[name for name in LAYERS if name not in kept])
        if made is not None:
            made.append((loading.plan_to_make_by, dict(kept)))
        with loading.stages("plan"):
            found = loading.survey(model, Layers(kept), planned=by_plan or {}, calls=calls)
        loading.tell(found)
        loading.fill(found, model.load_weights, False)
        return model

    return loading.model(make, lambda: None)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(same_bytes, a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_a_second_start_asks_nothing_and_loads_the_same(
    scheme: str, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, said = load(source, scheme=scheme), caplog.messages[:2]
    assert (Engine.asked, RECALLED in caplog.text) == (1, False)
    caplog.clear()
    second = load(source, scheme=scheme)
    assert (Engine.asked, caplog.messages[0].partition(" (")[0]) == (1, f"octavo: {RECALLED}")
    assert caplog.messages[1:3] == said
    assert equal(first, second)
    assert second.has_loaded


def test_a_layer_that_has_to_stay_stays_from_the_beginning(source: Path) -> None:
    first, asked = load(source, down="hoarded"), Engine.asked
    assert asked > 1
    assert equal(first, load(source, down="hoarded"))
    assert Engine.asked == asked
    assert first.down_proj.weight.dtype == torch.bfloat16


def test_what_stays_by_the_plan_is_known_without_it(source: Path) -> None:
    made: list[Any] = []
    for _ in range(2):
        load(source, by_plan={"router": "all of its tensors stay"}, made=made)
    (plan, _), second = made
    assert plan.placements
    assert second == (None, {"router": "all of its tensors stay"})


def test_nothing_is_kept_or_used_unless_it_is_wanted(source: Path, cache: Path) -> None:
    load(source, remember=False)
    assert not cache.exists()
    load(source)
    load(source, remember=False)
    assert Engine.asked == 3


def _touch_config(source: Path) -> None:
    (source / "config.json").write_text('{"model_type": "top"}')


def _rename(source: Path) -> None:
    (file,) = source.glob("*.safetensors")
    file.rename(file.with_name("other.safetensors"))


def _change_header(source: Path) -> None:
    (file,) = source.glob("*.safetensors")
    file.write_bytes(file.read_bytes().replace(b'"BF16","shape":[256,256]', b'"F16", "shape":[256,256]', 1))


@pytest.mark.parametrize("change", [_touch_config, _rename, _change_header])
def test_another_checkpoint_is_planned(change: Any, source: Path) -> None:
    load(source)
    change(source)
    load(source)
    assert Engine.asked == 2


@pytest.mark.parametrize(
    "other",
    [{"ignore": ["norm"]}, {"staging_bytes": 1 << 24}, {"scheme": "fp8_block"}, {"strict": True}, {"depends": "ranks"}],
)
def test_other_settings_are_planned(other: dict[str, Any], source: Path) -> None:
    load(source)
    load(source, **other)
    assert Engine.asked == 2


def _other_table(model: Engine) -> None:
    model.experts[0] = 3


def _other_attribute(model: Engine) -> None:
    model.tp_size = 2  # type: ignore[assignment]


def _other_parameter(model: Engine) -> None:
    model.norm.output_dim = 1  # type: ignore[attr-defined]


def _other_shape(model: Engine) -> None:
    model.more = nn.Parameter(torch.empty(0))


@pytest.mark.parametrize("change", [_other_table, _other_attribute, _other_parameter, _other_shape])
def test_another_model_is_planned_and_remembered(change: Any, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Changed(Engine):
        changes = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if Changed.changes:
                change(self)

    load(source, kind=Changed)
    Changed.changes = True
    load(source, kind=Changed)
    assert (Engine.asked, "what was remembered does not fit" in caplog.text) == (2, True)
    load(source, kind=Changed)
    assert Engine.asked == 2


def test_edited_code_is_planned(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is there from the beginning, and one that came while the first model was loaded."""
    for name in ("early", "late"):
        file = tmp_path / f"{name}.py"
        file.write_text("x = 1")
        module = types.ModuleType(name)
        module.__file__ = str(file)
        if name == "early":
            monkeypatch.setitem(sys.modules, name, module)

    class Importing(Engine):
        def load_weights(self, weights: Any) -> None:
            monkeypatch.setitem(sys.modules, "late", module)
            super().load_weights(weights)

    def start() -> int:
        monkeypatch.delitem(sys.modules, "late", raising=False)
        load(source, kind=Importing)
        return Engine.asked

    assert [start(), start()] == [1, 1]
    for number, name in enumerate(("early", "late")):
        (tmp_path / f"{name}.py").write_text("x = 2")
        assert [start(), start()] == [2 + number] * 2


def test_other_code_that_comes_while_the_model_is_made_is_planned(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source)
    module = types.ModuleType("unheard_of")
    module.__file__ = __file__ + "c"

    class Importing(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            monkeypatch.setitem(sys.modules, "unheard_of", module)

    Importing.__qualname__, Importing.__module__ = Engine.__qualname__, Engine.__module__
    load(source, kind=Importing)
    assert Engine.asked == 2


class Lazily:
    """Makes a table of a model when it is asked."""

    def __init__(self, make: Any) -> None:
        self.make = make


class Leaving(Engine):
    """Leaves something in the model beside weights, as ``leave`` says of the names that came."""

    leave: Any = None
    called = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = Lazily(None)

    def load_weights(self, weights: Any) -> None:
        pairs = list(weights)
        super().load_weights(pairs)
        Leaving.leave(self, [name for name, _ in pairs])


def _table(model: Any, names: list[str]) -> None:
    if not hasattr(model, "table"):
        model.table = Lazily(lambda: dict(model.named_parameters()))


def _parameters(model: Any, names: list[str]) -> None:
    model.table = {"norm": [model.norm.data, model.experts]}


def _list(model: Any, names: list[str]) -> None:
    model.names = ["norm"]


def _call(model: Any, names: list[str]) -> None:
    Leaving.called += "compute"


@pytest.mark.parametrize("leave", [_table, _parameters, _list, _call])
def test_what_a_loader_leaves_without_weights_a_second_start_has_by_running_it(
    leave: Any, source: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls() -> str:
        found, Leaving.called = Leaving.called, ""
        return found

    monkeypatch.setattr(Leaving, "leave", staticmethod(leave))
    first = load(source, kind=Leaving, calls=calls)
    Engine.asked = 0
    second = load(source, kind=Leaving, calls=calls)
    assert (Engine.asked, RECALLED in caplog.text) == (1, True)  # on nothing
    assert equal(first, second)
    assert {*vars(first)} == {*vars(second)}
    if leave is _table:
        assert second.table.make()["norm"] is second.norm
    if leave is _parameters:
        assert second.table["norm"][0].data_ptr() == second.norm.data_ptr()


def test_a_loader_that_leaves_something_else_is_asked_again(
    source: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for leave in (_table, _list):
        monkeypatch.setattr(Leaving, "leave", staticmethod(leave))
        load(source, kind=Leaving)
    assert (Engine.asked, "its loader leaves something else" in caplog.text) == (5, True)  # three times on nothing


def _list_of_names(model: Any, names: list[str]) -> None:
    model.names = names


def _function_of_names(model: Any, names: list[str]) -> None:
    model.names = lambda: names


def _tensor(model: Any, names: list[str]) -> None:
    model.table = torch.zeros(1)


def _function_of_a_tensor(model: Any, names: list[str]) -> None:
    tensor = torch.zeros(1)
    model.table = Lazily(lambda: tensor)


def _moved(model: Any, names: list[str]) -> None:
    model.experts.add_(1)


def _object_that_was_there(model: Any, names: list[str]) -> None:
    model.options = Lazily(None)


def _more_each_time(model: Any, names: list[str]) -> None:
    model.table, model.times = Lazily(None), getattr(model, "times", 0) + 1


def _error_without_names(model: Any, names: list[str]) -> None:
    model.table = Lazily(None)
    if not names:
        raise KeyError("norm")


def _call_by_names(model: Any, names: list[str]) -> None:
    Leaving.called += f"compute {len(names)}"


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (_list_of_names, "what a loader sets names to depends on what it is given"),
        (_function_of_names, "what a loader sets names to depends on what it is given"),
        (_tensor, "a loader has set table, which holds tensors of its own"),
        (_function_of_a_tensor, "a loader has set table, which holds tensors of its own"),
        (_moved, "a loader has changed experts"),
        (_object_that_was_there, "a loader has changed options"),
        (_more_each_time, "a loader that runs again changes more in a model"),
        (_error_without_names, "KeyError: 'norm'"),
        (_call_by_names, "which calls a loader makes depends on what it is given: compute"),
    ],
)
def test_what_nobody_could_do_again_is_not_remembered_and_said(
    leave: Any,
    said: str,
    source: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def calls() -> str:
        found, Leaving.called = Leaving.called, ""
        return found

    monkeypatch.setattr(Leaving, "leave", staticmethod(leave))
    model = load(source, kind=Leaving, calls=calls)
    assert not cache.exists()
    assert f"the plan can't be remembered: {said}" in caplog.text.replace("ValueError: ", "")
    assert leave is not _function_of_names or "norm" in model.names()  # as it was left


def test_a_model_that_cant_be_looked_at_is_loaded_all_the_same(source: Path, cache: Path, monkeypatch: Any) -> None:
    def fail(model: nn.Module) -> None:
        raise RuntimeError("some object of it has its own mind")

    monkeypatch.setattr(facts, "of_model", fail)
    assert load(source).has_loaded
    assert not cache.exists()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _checked(change: Any) -> Any:
    """An entry with other content, and a checksum that is right."""

    def rewrite(file: Path) -> None:
        content = json.loads(file.read_bytes().partition(b"\n")[2])
        entries.write(file, change(content))

    return rewrite


def _of_another(file: Path) -> None:
    other = file.with_name("0" * 64)
    entries.write(other, json.loads(file.read_bytes().partition(b"\n")[2]))
    other.replace(file)


def _without_norm(content: Any) -> Any:
    """Where nothing is said of a parameter."""
    survey = content["survey"]
    survey["direct"] = [row for row in survey["direct"] if row[1][0] != "norm"]
    del survey["fillers"]["layers"][""]
    return content


def _with_attribute(content: Any, row: list[Any]) -> Any:
    return {**content, "left": {**content["left"], "attributes": [row]}}


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _by_others(file: Path) -> None:
    file.chmod(0o666)


ODD = {
    "truncated": _truncate,
    "empty": _empty,
    "one of something else": _of_another,
    "a folder": _folder,
    "writable for others": _by_others,
    "a list": _checked(lambda content: [content]),
    "another key": _checked(lambda content: {**content, "more": 1}),
    "a missing key": _checked(lambda content: {key: value for key, value in content.items() if key != "model"}),
    "a config that is none": _checked(lambda content: {**content, "config": []}),
    "a number for a list": _checked(lambda content: {**content, "left": 1}),
    "an attribute that is no plain one": _checked(lambda content: _with_attribute(content, ["", "load_weights", [1]])),
    "an attribute of nothing": _checked(lambda content: _with_attribute(content, ["nothing", "x", 1])),
    "another model": _checked(lambda content: {**content, "model": "0" * 64}),
    "a parameter that nothing fills": _checked(_without_norm),
    "a survey of nothing": _checked(lambda content: {**content, "survey": {}}),
    "layers that don't stay": _checked(lambda content: {**content, "kept": {"down_proj": "why not"}}),
}


@pytest.mark.parametrize("spoil", ODD.values(), ids=[*ODD])
def test_an_odd_entry_is_as_none_and_made_anew(spoil: Any, source: Path, cache: Path) -> None:
    first = load(source)
    (entry,) = cache.iterdir()
    spoil(entry)
    assert equal(first, load(source))
    assert Engine.asked == 2
    if entry.is_file():
        assert equal(first, load(source))
        assert Engine.asked == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cant_be_written_costs_a_line(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(mode=0o500)
    load(source)
    assert "the plan can't be remembered" in caplog.text


def test_a_folder_that_is_none_costs_a_line(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_text("")
    load(source)
    assert "the plan can't be remembered" in caplog.text


def test_what_cant_be_written_down_fails_no_load(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loading, "_config_of", lambda *_: {"of its own": object()})
    assert load(source).has_loaded
    assert [*cache.iterdir()] == []
    assert "the plan can't be remembered: TypeError" in caplog.text


def _open_to_others(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def _leading_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [_open_to_others, _leading_elsewhere])
def test_nothing_is_written_or_removed_in_a_folder_of_others(
    make: Any, source: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_MAX_ENTRIES", 0)
    make(cache)
    theirs = cache / ("0" * 64)  # as a cache of downloads calls its files
    theirs.write_text("")
    load(source)
    assert [*cache.iterdir()] == [theirs]
    assert "no folder that this user alone may write to" in caplog.text


def test_a_plan_that_could_not_be_read_again_is_not_kept(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_MAX_ENTRY_BYTES", 100)
    load(source)
    assert [*cache.iterdir()] == []
    assert "bytes is not kept" in caplog.text


def test_entries_are_for_this_user_alone_and_few(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_MAX_ENTRIES", 2)
    cache.mkdir(mode=0o700, parents=True)
    abandoned, folder = cache / f"{'0' * 64}.abandoned", cache / "f"
    abandoned.write_text("")
    folder.mkdir()
    for others in (cache / "mine", cache / "tmp_mine"):
        others.write_text("")
    for path in (abandoned, *cache.iterdir()):
        os.utime(path, (0, 0))
    for number in range(3):
        load(source, depends=str(number))
        for age, entry in enumerate(sorted(cache.glob("?" * 64), key=lambda item: -item.stat().st_mtime)):
            os.utime(entry, ns=(0, 10**18 - age * 10**9))
    assert {item.name for item in cache.iterdir() if len(item.name) < 64} == {"f", "mine", "tmp_mine"}  # as they were
    assert not abandoned.exists()
    kept = [*cache.glob("?" * 64)]
    assert len(kept) == 2
    assert {entry.stat().st_mode & 0o777 for entry in kept} == {0o600}
    load(source, depends="2")
    assert Engine.asked == 3


def test_a_loader_that_is_in_no_file_counts(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def load_weights(self, weights):\n    self.has_loaded = {}\n    given(self, weights)"
    for value, asked in ((1, 1), (1, 1), (2, 2)):
        scope: dict[str, Any] = {"given": Engine.load_weights}
        exec(text.format(value), scope)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "load_weights", scope["load_weights"])
            load(source)
        assert Engine.asked == asked
