"""Ways to quantize a weight, octavo's and those of peers by their own functions: from a matrix to what it becomes."""

from __future__ import annotations

import contextlib
import copy
import io
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from octavo.numerics import nvfp4, schemes

#: a weight in bf16 or fp16 [out, in] -> float32
Way = Callable[[Tensor], Tensor]


def octavo(scheme: str) -> Way:
    return lambda weight: schemes.dequantize(*schemes.quantize(weight, scheme), scheme)


def nvfp4_to_nearest(weight: Tensor) -> Tensor:
    """Octavo's nvfp4 without its search for scales."""
    stored = torch.empty(weight.shape[0], nvfp4.stored_columns(weight.shape[1]), dtype=torch.uint8)
    scale = nvfp4.global_scale(weight.float().abs().amax((-2, -1), keepdim=True))
    nvfp4.quantize_into(nvfp4.Packed.of(stored), weight, scale, search=False)
    return nvfp4.widen(nvfp4.Packed.of(stored)).float() * scale


def compressed_tensors(preset: str) -> Way:
    """By the range of each group, as llm-compressor's observers find it."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = preset_name_to_scheme(preset, ["Linear"]).weights

    def way(weight: Tensor) -> Tensor:
        if arguments.strategy in ("group", "tensor_group"):
            groups = weight.unflatten(-1, (-1, arguments.group_size))
            low, high = groups.amin(-1), groups.amax(-1)
        elif arguments.strategy == "channel":
            low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        else:
            low, high = (end.reshape(1) for end in (weight.amin(), weight.amax()))
        whole = generate_gparam(low.min().view(1), high.max().view(1)) if arguments.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
        q = quantize(weight, scale, zero, arguments, global_scale=whole)
        return dequantize(q, scale, zero, arguments, dtype=torch.float32, global_scale=whole)

    return way


def torchao(config: str) -> Way:
    from torchao import quantization

    made = getattr(quantization, config)()

    def way(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantization.quantize_(layer, made)
        return layer.weight.dequantize().float()

    return way


def torchao_mx() -> Way:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def way(weight: Tensor) -> Tensor:
        made = MXTensor.to_mx(weight, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
        return made.dequantize(torch.float32)

    return way


def transformers_blocks() -> Way:
    """The operation by which its fine-grained quantizer makes FP8."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    made = Fp8Quantize(types.SimpleNamespace(quantization_config=FineGrainedFP8Config()))

    def way(weight: Tensor) -> Tensor:
        rows, cols = weight.shape
        # ragged matrices, which it leaves alone, with zeros up to whole blocks, which are no largest magnitude
        padded = nn.functional.pad(weight, (0, -cols % 128, 0, -rows % 128))
        found = made.convert({"x.weight": padded})
        scale = found["x.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (found["x.weight"].float() * scale)[:rows, :cols]

    return way


def modelopt(kind: str, **how: Any) -> Way:
    """By the tensors into which ModelOpt packs what it exports; ``how``: of which weights each scale is."""
    from modelopt.torch.quantization import qtensor

    made = getattr(qtensor, kind)

    def way(weight: Tensor) -> Tensor:
        quantized, scale = made.quantize(weight.clone(), **how)
        found: Tensor = quantized.dequantize(torch.float32, scale=scale)
        return found

    return way


def modelopt_nvfp4() -> Way:
    """Rounded to nearest, as ModelOpt exports what it has not calibrated."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def way(weight: Tensor) -> Tensor:
        quantized, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
        found: Tensor = quantized.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        return found

    return way


def modelopt_calibrated(config: str) -> Way:
    """By a quantizer of ModelOpt after its own calibration of scales, which runs on GPUs alone."""
    import modelopt.torch.quantization as mtq

    if not torch.cuda.is_available():
        raise RuntimeError("ModelOpt calibrates these scales on GPUs alone")
    chosen = copy.deepcopy(getattr(mtq, config))
    chosen["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})

    def way(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda")
        layer.weight.data.copy_(weight)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = mtq.quantize(nn.Sequential(layer), copy.deepcopy(chosen), None)[0]
        found: Tensor = made.weight_quantizer(made.weight)
        return found.float().cpu()

    return way


def modelopt_chosen(tried: Callable[[Tensor], Iterator[Tensor]], largest: float) -> Way:
    """The same without a GPU: ModelOpt's tensor under several scales, and of each group the least squared error.

    It has the errors of the calibrated quantizers, to all digits that are published.

    Args:
        tried: of scales by which the largest of a group becomes 6 -> all that are tried.
        largest: on which e4m3 number the largest scale of a matrix is put.
    """
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def way(weight: Tensor) -> Tensor:
        wide = weight.float()
        whole = wide.abs().amax() / (6 * largest)
        first = wide.unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * whole)
        best = least = None
        for scale in tried(torch.where(first == 0, 1, first)):
            quantized, _, _ = NVFP4QTensor.quantize(wide.clone(), 16, scale, whole)
            made = quantized.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
            groups = made.unflatten(-1, (-1, 16))
            error = (made - wide).unflatten(-1, (-1, 16)).square().sum(-1)
            if best is None or least is None:
                best, least = groups, error
            else:
                best = torch.where((error < least)[..., None], groups, best)
                least = torch.minimum(error, least)
        assert best is not None
        return best.flatten(-2)

    return way


def _as_e4m3(scale: Tensor) -> Tensor:
    return scale.clamp(2.0**-9, 448).to(torch.float8_e4m3fn)


def four_and_six(first: Tensor) -> Iterator[Tensor]:
    """Scales by which the largest becomes 6, or 4."""
    yield _as_e4m3(first)
    yield _as_e4m3(first * 1.5)


def around(first: Tensor) -> Iterator[Tensor]:
    """Thirteen numbers of e4m3, beyond which none is the best."""
    code = _as_e4m3(first).view(torch.uint8).int()
    for step in range(-6, 7):
        yield (code + step).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)


#: name -> what makes it
WAYS: dict[str, Callable[[], Way]] = {
    "octavo fp8_channel": lambda: octavo("fp8_channel"),
    "octavo fp8_block": lambda: octavo("fp8_block"),
    "octavo fp8_tensor": lambda: octavo("fp8_tensor"),
    "octavo mxfp8": lambda: octavo("mxfp8"),
    "octavo int8_channel": lambda: octavo("int8_channel"),
    "octavo nvfp4": lambda: octavo("nvfp4"),
    "octavo nvfp4 (search=none)": lambda: nvfp4_to_nearest,
    "compressed-tensors FP8_DYNAMIC": lambda: compressed_tensors("FP8_DYNAMIC"),
    "compressed-tensors FP8": lambda: compressed_tensors("FP8"),
    "compressed-tensors MXFP8": lambda: compressed_tensors("MXFP8"),
    "compressed-tensors INT8": lambda: compressed_tensors("INT8"),
    "compressed-tensors NVFP4A16": lambda: compressed_tensors("NVFP4A16"),
    "torchao Float8WeightOnlyConfig": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao Int8WeightOnlyConfig": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao mxfp8 (RCEIL)": torchao_mx,
    "transformers FineGrainedFP8Config": transformers_blocks,
    "ModelOpt FP8": lambda: modelopt("FP8QTensor"),
    "ModelOpt FP8, a scale a row": lambda: modelopt("FP8QTensor", axis=0),
    "ModelOpt MXFP8": lambda: modelopt("MXFP8QTensor"),
    "ModelOpt INT8": lambda: modelopt("INT8QTensor", axis=0),
    "ModelOpt NVFP4": modelopt_nvfp4,
    "ModelOpt NVFP4, four over six": lambda: modelopt_chosen(four_and_six, 256),
    "ModelOpt NVFP4, the best of 13 scales": lambda: modelopt_chosen(around, 448),
    "ModelOpt NVFP4_FOUR_OVER_SIX_CFG": lambda: modelopt_calibrated("NVFP4_FOUR_OVER_SIX_CFG"),
    "ModelOpt NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": lambda: modelopt_calibrated("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
}
#: a scale a row, of octavo and of peers
REDRAWN = ("octavo fp8_channel", "compressed-tensors FP8_DYNAMIC", "ModelOpt FP8, a scale a row")
#: octavo's schemes whose readers quantize activations, too
ACTIVATIONS = ("octavo fp8_channel", "octavo int8_channel")


def each_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Activations in 8 bits and back, a scale a token, as products with 8-bit activations take them."""
    largest = schemes.NUMBERS[dtype].largest
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
    values = x / scale
    return (values.round() if dtype == torch.int8 else values.to(dtype).float()) * scale


class QuantizedInputs:
    """While entered, the inputs of some layers are quantized."""

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype | None) -> None:
        self._layers, self._dtype, self._handles = layers, dtype, []

    def __enter__(self) -> None:
        def hook(module: nn.Module, inputs: Any) -> Any:
            return (each_token(inputs[0], self._dtype), *inputs[1:])

        if self._dtype is not None:
            self._handles = [layer.register_forward_pre_hook(hook) for layer in self._layers]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def linear_layers(model: nn.Module, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that octavo quantizes by default."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(keep):
            yield name, module
