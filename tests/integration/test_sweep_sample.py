"""A sample of the sweep over every model of transformers, of many kinds: what is asked of each is in `sweep.checks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import transformers

from sweep.cases import every_case
from sweep.checks import check

#: what transformers warns of is not what is asked here
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {case.name: case for case in every_case()}
SAMPLE = (
    # decoders: fused and split heads, no rotary embedding, tied heads, transposed layers
    "bloom/BloomForCausalLM",
    "gpt2/GPT2LMHeadModel",
    "gpt_bigcode/GPTBigCodeForCausalLM",
    "gemma3_text/Gemma3TextForSequenceClassification",
    "modernbert-decoder/ModernBertDecoderForCausalLM",
    "mpt/MptForCausalLM",
    "openai-gpt/OpenAIGPTLMHeadModel",
    "opt/OPTForCausalLM",
    "phi/PhiModel",
    "smollm3/SmolLM3ForSequenceClassification",
    "xglm/XGLMForCausalLM",
    # states instead of attention, or beside it
    "falcon_mamba/FalconMambaModel",
    "lfm2/Lfm2Model",
    "mamba/MambaModel",
    # experts: stacks, stacks with biases, stacks that a class reads itself
    "gpt_oss/GptOssForCausalLM",
    "jetmoe/JetMoeModel",
    "openai_privacy_filter/OpenAIPrivacyFilterForTokenClassification",
    "qwen3_moe/Qwen3MoeForSequenceClassification",
    # encoders whose heads are tied by other names
    "bert/BertForPreTraining",
    "distilbert/DistilBertForQuestionAnswering",
    "electra/ElectraForTokenClassification",
    "modernbert/ModernBertForMaskedLM",
    "roberta/RobertaForMaskedLM",
    "squeezebert/SqueezeBertForMaskedLM",
    "xlm/XLMWithLMHeadModel",
    "xlnet/XLNetModel",
    # encoders and decoders
    "t5/T5EncoderModel",
    "whisper/WhisperForAudioClassification",
    # images
    "clip/CLIPForImageClassification",
    "data2vec-vision/Data2VecVisionForImageClassification",
    "dinov3_vit/DINOv3ViTBackbone",
    "poolformer/PoolFormerForImageClassification",
    "resnet/ResNetModel",
    "siglip/SiglipForImageClassification",
    "superpoint/SuperPointForKeypointDetection",
    # sound, time, layouts, and several at once
    "layoutlm/LayoutLMForMaskedLM",
    "tapas/TapasForSequenceClassification",
    "timesfm/TimesFmModelForPrediction",
    "vilt/ViltModel",
    "wav2vec2/Wav2Vec2ForCTC",
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in SAMPLE if name in CASES])
def test_a_type_is_loaded_run_converted_and_read_back(name: str, tmp_path: Path) -> None:
    result = check(CASES[name], tmp_path)
    assert result["status"] == "right", result


def test_the_sample_is_of_forty_types() -> None:
    assert len({name.partition("/")[0] for name in SAMPLE}) == 40
