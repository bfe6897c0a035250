"""Generate with vLLM in FP8 from a bf16 checkpoint. All engine options are those of vLLM:

python examples/vllm_generate.py --model Qwen/Qwen3-8B --quantization octavo_fp8_channel
python examples/vllm_generate.py --model Qwen/Qwen3-30B-A3B --quantization octavo_fp8_block -tp 2
python examples/vllm_generate.py --model Qwen/Qwen3-8B --load-format octavo \\
    --model-loader-extra-config '{"scheme": "fp8_block", "ignore": ["*.down_proj"]}'
"""

from __future__ import annotations

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROMPTS = ["The capital of France is", "An octavo is a book", "The three laws of thermodynamics are"]


def main() -> None:
    parser = FlexibleArgumentParser(description=__doc__)
    EngineArgs.add_cli_args(parser)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.set_defaults(quantization="octavo_fp8_channel")
    options = vars(parser.parse_args())
    sampling = SamplingParams(temperature=0, max_tokens=options.pop("max_tokens"))
    for output in LLM(**options).generate(PROMPTS, sampling):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
