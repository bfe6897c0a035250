"""The log of vLLM, and errors in it, which vLLM prints in three processes, below what led to them."""

from __future__ import annotations

from vllm.logger import init_logger

from ..engine.telling import Telling

# below vLLM's own loggers, so that its settings hold for ours
log = init_logger("vllm.octavo")
telling = Telling(log)
