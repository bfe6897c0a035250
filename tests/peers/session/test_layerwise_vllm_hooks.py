"""vLLM 0.32's own hooks for layers that are complete, and `octavo.layerwise`, given the same incomplete weights.

vLLM's online quantization and its reloading wrap the weight loaders, count the elements that they copy, and process a
layer when the count is full, or at the end whatever the count is. The hooks are called by vLLM's own loader, on its own
model class; nothing is replaced. Memory that nobody wrote is NaN here (torch's deterministic mode fills it), so what a
layer was made of can be seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.models import differences, state_of
from helpers.vllm_checkpoints import make
from helpers.vllm_models import VERSION, FromPairs, build, config_of, one_rank, set_current_vllm_config
from octavo.errors import CoverageError, UpdateError
from octavo.numerics import schemes

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
]

Weights = list[tuple[str, Tensor]]
MLP = "model.layers.1.mlp."
GATE, UP = f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"
FUSED = f"{MLP}gate_up_proj.weight"
HALF = 256  # rows of gate in the fused weight, and of up


def without(weights: Weights, begin: str) -> Weights:
    return [pair for pair in weights if not pair[0].startswith(begin)]


def gate_twice(weights: Weights) -> Weights:
    """As many elements as the fused layer has, half of them never written."""
    return [*without(weights, UP), *(pair for pair in weights if pair[0] == GATE)]


#: what is wrong -> (what makes it so, what `octavo.layerwise` says of it)
SPOILED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "one half twice": (
        gate_twice,
        f"{FUSED}[0:256, 0:128] is written twice: by {GATE}, and by {GATE}",
    ),
    "half missing": (lambda weights: without(weights, UP), f"{FUSED} [512, 128]: nothing wrote [256:512, 0:128]"),
    "no weights": (lambda weights: without(weights, MLP), f"{FUSED} [512, 128]: nothing was loaded"),
}
by_fault = pytest.mark.parametrize("what", SPOILED)
of_vllm = pytest.mark.skipif(VERSION < (0, 32), reason="what is written down here is what vLLM 0.32 does")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with one_rank():
        yield make("llama", tmp_path_factory.mktemp("hooks") / "llama")


@pytest.fixture
def weights(folder: Path) -> Weights:
    return list(tensors_of(folder).items())


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's worker does on a CPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What vLLM logs as warnings and errors; its loggers don't propagate."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def quantized_by_vllm(folder: Path, weights: Weights, warned: list[str]) -> nn.Module:
    """A first load with online quantization, by vLLM's own loader."""
    config = config_of(folder, "fp8_per_channel")
    warned.clear()
    model: nn.Module = FromPairs(weights).load_model(config, config.model_config)
    return model


def reload_by_vllm(model: nn.Module, folder: Path, weights: Weights, warned: list[str]) -> None:
    """As `reload_weights` of vLLM's model runner does."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config = config_of(folder, "fp8_per_channel")
    warned.clear()
    with set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights))  # type: ignore[operator]
        finalize_layerwise_reload(model, config.model_config)


def wrong_layers(mine: nn.Module, right: nn.Module) -> set[str]:
    return {name.removesuffix("_scale") for name in differences(mine, right)}


def assert_up_was_never_written(mine: nn.Module, right: nn.Module) -> None:
    """The gate half of the fused layer is right; the other was quantized from memory that nobody wrote."""
    assert wrong_layers(mine, right) == {FUSED}
    scale, expected = (state_of(model)[f"{FUSED}_scale"] for model in (mine, right))
    assert same_bytes(scale[:HALF], expected[:HALF])
    assert bool(scale[HALF:].isnan().all())
    weight = state_of(mine)[FUSED].float()  # stored [in, out]
    assert weight.shape == (128, 2 * HALF)
    assert not weight[:, :HALF].isnan().any()
    assert weight[:, HALF:].isnan().all()


@of_vllm
@by_fault
def test_vllms_hooks_let_a_first_load_pass(what: str, folder: Path, weights: Weights, warned: list[str]) -> None:
    right = quantized_by_vllm(folder, weights, warned)
    assert not any(tensor.float().isnan().any() for tensor in state_of(right).values())
    model = quantized_by_vllm(folder, SPOILED[what][0](weights), warned)
    assert warned == []
    if what != "no weights":
        assert_up_was_never_written(model, right)
        return
    assert wrong_layers(model, right) == {FUSED, f"{MLP}down_proj.weight"}
    for name in (FUSED, f"{MLP}down_proj.weight"):
        assert state_of(model)[name].float().isnan().all()


@of_vllm
@by_fault
def test_vllms_hooks_let_a_reload_pass(what: str, folder: Path, weights: Weights, warned: list[str]) -> None:
    new = [(name, tensor * 2) for name, tensor in weights]
    right, model = (quantized_by_vllm(folder, weights, warned) for _ in range(2))
    old = {name: tensor.clone() for name, tensor in state_of(model).items()}
    reload_by_vllm(right, folder, new, warned)
    usual = sorted(warned)  # a table of rotations, of which no checkpoint has a tensor
    reload_by_vllm(model, folder, SPOILED[what][0](new), warned)
    if what != "no weights":
        assert sorted(warned) == usual
        assert_up_was_never_written(model, right)
        return
    # the old weights stay; a line in the log says of what class the layers are, and not which
    for name in (FUSED, f"{MLP}down_proj.weight"):
        assert same_bytes(state_of(model)[name], old[name])
        assert same_bytes(state_of(model)[f"{name}_scale"], old[f"{name}_scale"])
    assert sorted(set(warned) - set(usual)) == [
        "MergedColumnParallelLinear: Failed to load weights",
        "RowParallelLinear: Failed to load weights",
    ]


@of_vllm
def test_vllms_hooks_name_nothing_when_a_layer_is_finished_early(
    folder: Path, weights: Weights, warned: list[str]
) -> None:
    """One half twice and then the other, which finds a layer that is quantized already."""
    twice = [*(pair for pair in weights if pair[0] == GATE), *weights]
    with pytest.raises(AssertionError) as caught:
        quantized_by_vllm(folder, twice, warned)
    assert "gate" not in f"{caught.value} {warned}"
    model = build(folder)
    with pytest.raises(CoverageError) as ours, octavo.layerwise(model, "fp8_channel"):
        model.load_weights(iter(twice))
    assert SPOILED["one half twice"][1] in str(ours.value)


@pytest.mark.parametrize("direct", [True, False])
@by_fault
def test_layerwise_refuses_a_first_load_by_name(what: str, direct: bool, folder: Path, weights: Weights) -> None:
    spoil, says = SPOILED[what]
    model = build(folder)
    session = octavo.layerwise(model, "fp8_channel", direct=direct)
    with pytest.raises(CoverageError) as caught, session:
        model.load_weights(iter(spoil(weights)))
    assert says in str(caught.value)
    finished = [event.layer for event in session.events if event.kind == "finish"]
    assert f"{MLP}gate_up_proj" not in finished
    assert model.get_parameter(FUSED).is_meta


def test_layerwise_refuses_an_update_that_brings_a_half_twice(folder: Path, weights: Weights) -> None:
    new = [(name, tensor * 2) for name, tensor in weights]
    model = build(folder)
    session = octavo.layerwise(model, "fp8_channel")
    with session:
        model.load_weights(iter(weights))
    with pytest.raises(UpdateError) as caught, session:
        model.load_weights(iter(gate_twice(new)))
    assert SPOILED["one half twice"][1] in str(caught.value)


def test_layerwise_leaves_whole_what_an_update_does_not_bring(folder: Path, weights: Weights) -> None:
    """Updates may be partial, and half of a layer is new beside the other: never memory that nobody wrote."""
    new = [(name, tensor * 3) for name, tensor in weights]
    model = build(folder)
    session = octavo.layerwise(model, "fp8_channel")
    with session:
        model.load_weights(iter(weights))
    with session:
        model.load_weights(iter(without(new, UP)))
    values = dict(weights)
    q, scale = schemes.quantize(torch.cat([values[GATE] * 3, values[UP]]), "fp8_channel", (HALF, HALF))
    assert same_bytes(state_of(model)[FUSED], q)
    assert same_bytes(state_of(model)[f"{FUSED}_scale"], scale)
