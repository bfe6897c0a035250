"""The quantization config that vLLM is given: that of the checkpoint which `octavo.convert` would write.

It is a compressed-tensors config, so that vLLM treats the model as it treats FP8 checkpoints on disk. With
``--quantization octavo_fp8_channel`` vLLM makes it early, before it decides about kernels and compilation, when nothing
is known of the checkpoint yet; with ``--load-format octavo`` alone, the loader makes it. `OctavoConfig.fill` completes
it either way, when the headers have been read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms import current_platform

from ...choices import DEFAULT_FORMAT
from ...conversion.formats import whole_config
from ...errors import RecipeError
from ...planning.kinds import default_keep
from ..engine.layers import LayerPatterns
from ..engine.names import FORMATS, LOAD_FORMAT, PREFIX
from ..engine.survey import error_text
from . import plugin, versions
from .fitting import FITTING, can_be_plain, check_kernel, is_linear
from .options import Options

# below vLLM's own loggers, so that its settings hold for ours
log = init_logger("vllm.octavo")

#: schemes that vLLM runs on each device, in one way or another
_RUN_EVERYWHERE = ("fp8_channel", "fp8_block")
#: what vLLM raises where it finds no kernel: it says so, or a build lacks a package or an operator
_NO_KERNEL = (RuntimeError, ValueError, AssertionError, ImportError, AttributeError)
#: load formats that octavo takes over, or that read no weights
_READ_BY_OCTAVO = (LOAD_FORMAT, *plugin.READ_BY_VLLM, "dummy")


class OctavoConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """See the module's docstring; one subclass for each scheme."""

    scheme = ""
    _used: ClassVar[OctavoConfig | None] = None  # for the model that is being made

    def __init__(self) -> None:
        super().__init__(target_scheme_map={}, ignore=[], quant_format="float-quantized")
        plugin.take_over()
        self.kept: dict[str, str] = {}  # layers that stay unquantized, whatever the config says -> why
        self.layers = LayerPatterns("vLLM")  # of layers that stay
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # layers, as vLLM calls them
        self.refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # those that don't fit FP8 -> why

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "names": None, "refused": None}  # layers are those of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.names, self.refused = WeakKeyDictionary(), WeakKeyDictionary()
        plugin.take_over()  # in this process, too

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OctavoConfig:
        raise RecipeError(
            f"--quantization {PREFIX}{cls.scheme}: the checkpoint is already quantized "
            f"({config.get('quant_method', 'unknown')}, says its config.json). Leave --quantization out to serve it as "
            "it is, or start from the bf16 checkpoint."
        )

    @classmethod
    def asked(cls) -> OctavoConfig:
        """What vLLM gets for ``--quantization``. A draft that looks up its config itself gets that of its loader."""
        return OctavoConfig._used if isinstance(OctavoConfig._used, cls) else cls()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While a model is made with it."""
        before, OctavoConfig._used = OctavoConfig._used, self
        try:
            yield
        finally:
            OctavoConfig._used = before

    def fill(self, config: Mapping[str, Any], kept: Mapping[str, str]) -> None:
        """Become the config of a compressed-tensors checkpoint, anew for each model that is made with it.

        Args:
            config: a ``quantization_config``.
            kept: layers that stay unquantized -> why.
        """
        self._take(config)
        self._check_kernel()
        self.packed_modules_mapping: dict[str, list[str]] = {}
        self.kept = dict(kept)
        self.names.clear()
        self.refused.clear()

    def _take(self, config: Mapping[str, Any]) -> None:
        parsed = CompressedTensorsConfig.from_config({**config, "ignore": list(config["ignore"])})
        self.target_scheme_map, self.ignore = parsed.target_scheme_map, parsed.ignore
        self.quant_format, self.config = parsed.quant_format, parsed.config

    def _check_kernel(self) -> None:
        """Raise where vLLM has no kernel of this scheme here at all: each layer would be one that does not fit."""
        if self.scheme in _RUN_EVERYWHERE:
            return
        try:
            _check_kernels(self)
        except _NO_KERNEL as error:
            here = [f"the format {name!r}" for name in self._other_formats()]
            others = [scheme for scheme in Options.offered() if scheme != self.scheme and _runs_here(scheme)]
            raise RecipeError(
                f"vLLM has no kernel for {self.scheme} here, on {current_platform.device_name} ({error_text(error)}). "
                f"Use {' or '.join([*here, *others])}; what `octavo convert` writes in {self.scheme}, vLLM runs where "
                "it has that kernel"
            ) from error

    def _other_formats(self) -> list[str]:
        """Those of the scheme that vLLM is not told of."""
        written = {name: whole_config(self.scheme, name)["format"] for name in Options.formats_of(self.scheme)}
        told = {scheme.get("format") for scheme in self.target_scheme_map.values()}
        return [name for name, found in written.items() if found not in told]

    def _pretend(self) -> None:
        """Be the config of a checkpoint of which nothing is known."""
        self._take(whole_config(self.scheme, FORMATS.get(self.scheme, DEFAULT_FORMAT)))
        log.warning(
            "octavo: --load-format dummy reads no checkpoint: layers are made in %s but for heads, routers and what "
            "vLLM keeps or can't make so. With the checkpoint, more may stay.",
            self.scheme,
        )

    def paths(self, model: nn.Module) -> dict[str, str]:
        """The place of each layer in the model -> vLLM's name of it, which differs for experts."""
        return {path: self.names[module] for path, module in model.named_modules() if module in self.names}

    def unquantized(self, model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        """The places of layers that were made unquantized -> why: as `fill` said; since vLLM can't make them in FP8."""
        kept = {path: self.kept[name] for path, name in self.paths(model).items() if name in self.kept}
        found = {path: self.refused[module] for path, module in model.named_modules() if module in self.refused}
        others = self._other_formats() if found else []
        advice = f"; the format {others[0]!r} has other kernels" if others else ""
        return kept, {
            path: f"vLLM can't make this layer in {self.scheme}: {why.rstrip('.')}{advice}"
            for path, why in found.items()
        }

    def has_blocked_weights(self) -> bool:
        """Asked by vLLM when it decides about kernels."""
        return self.scheme == "fp8_block"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        current = get_current_vllm_config_or_none()
        load_format = current.load_config.load_format if current is not None else LOAD_FORMAT
        if load_format not in _READ_BY_OCTAVO:
            raise RecipeError(
                f"--quantization {PREFIX}{self.scheme} quantizes what octavo reads, and --load-format {load_format} "
                f"reads weights itself; use --load-format {LOAD_FORMAT}, or leave it out"
            )
        self.names[layer] = prefix
        if can_be_plain(layer) and (pattern := self.layers.matching(prefix)):
            self.kept.setdefault(prefix, f"ignored by {pattern!r}")
        if load_format == "dummy" and not self.target_scheme_map:
            self._pretend()
        # by its name, if it has one: some heads of vLLM's have none
        if prefix in self.kept or (load_format == "dummy" and (not prefix or default_keep(prefix))):
            with self._ignoring(["re:.*"]):
                return super().get_quant_method(layer, prefix)
        ways = [functools.partial(self._method, layer, prefix)]
        if self.has_blocked_weights() and is_linear(layer):
            ways.append(functools.partial(self._weights_only, layer, prefix))
        return FITTING.fitted(ways, layer, self.refused)

    def _weights_only(self, layer: nn.Module, prefix: str) -> Any:
        """The method for FP8 weights and activations as they are, of which no groups have to be made."""
        given = self.target_scheme_map
        self.target_scheme_map = {target: {**scheme, "input_activations": None} for target, scheme in given.items()}
        try:
            return self._method(layer, prefix)
        finally:
            self.target_scheme_map = given

    def _method(self, layer: nn.Module, prefix: str) -> Any:
        try:
            with self._ignoring(_joined(tuple(self.ignore))):
                method = super().get_quant_method(layer, prefix)
        except ValueError as error:
            if "different quantization schemes" not in str(error):
                raise
            parts = self.packed_modules_mapping.get(prefix.rpartition(".")[2], ["several tensors"])
            raise RecipeError(
                f"vLLM fuses {', '.join(parts)} into {prefix}, and only some of them are to stay unquantized; ignore "
                "all of them, or none"
            ) from error
        check_kernel(method, layer)
        return method

    @contextlib.contextmanager
    def _ignoring(self, patterns: list[str]) -> Iterator[None]:
        ignore, self.ignore = self.ignore, patterns
        try:
            yield
        finally:
            self.ignore = ignore


def _check_kernels(config: CompressedTensorsConfig) -> None:
    """Raise what vLLM raises where it has no kernel here for what a config says of layers."""
    for scheme in config.target_scheme_map.values():
        versions.check_kernel(
            config, *(scheme.get(key) for key in ("weights", "input_activations", "output_activations", "format"))
        )


def _runs_here(scheme: str) -> bool:
    """Return True for a scheme that vLLM has kernels for here."""
    if scheme in _RUN_EVERYWHERE:
        return True
    try:
        _check_kernels(CompressedTensorsConfig.from_config(whole_config(scheme, Options.formats_of(scheme)[0])))
    except _NO_KERNEL:
        return False
    return True


@functools.lru_cache(maxsize=16)
def _joined(ignore: tuple[str, ...]) -> list[str]:
    """The same to ignore with one pattern for all: vLLM looks each one up for each layer, several times."""
    patterns = [name.removeprefix("re:") for name in ignore if name.startswith("re:")]
    names = [name for name in ignore if not name.startswith("re:")]
    return [*names, f"re:{'|'.join(f'(?:{pattern})' for pattern in patterns)}"] if patterns else names


class OctavoFp8ChannelConfig(OctavoConfig):
    """``--quantization octavo_fp8_channel``."""

    scheme = "fp8_channel"


class OctavoFp8BlockConfig(OctavoConfig):
    """``--quantization octavo_fp8_block``."""

    scheme = "fp8_block"


class OctavoInt8ChannelConfig(OctavoConfig):
    """``--quantization octavo_int8_channel``."""

    scheme = "int8_channel"


class OctavoNvfp4Config(OctavoConfig):
    """``--quantization octavo_nvfp4``."""

    scheme = "nvfp4"


#: scheme -> its config
CONFIGS = {
    config.scheme: config
    for config in (OctavoFp8ChannelConfig, OctavoFp8BlockConfig, OctavoInt8ChannelConfig, OctavoNvfp4Config)
}
