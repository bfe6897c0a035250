"""What the accelerator path does beside streaming, as far as a CPU can show it."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import DeviceError
from octavo.numerics import schemes
from octavo.streaming.on_accelerator import WarmUp, rehearse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_rehearsal_goes_well_while_a_model_is_built(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of all threads, as transformers and vLLM do
    try:
        rehearse(torch.device("cpu"), schemes.SCHEMES)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_fails_the_warm_up_when_it_is_left():
    warm_up, done = WarmUp(torch.device("cuda", 0), 64 << 20, 2, ["fp8_channel"]), []
    with pytest.raises(DeviceError, match="can't be used here"), warm_up:
        done.append("the body")
    assert done == ["the body"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_beside_a_failed_warm_up_is_the_one_that_is_raised():
    with pytest.raises(KeyError, match="of the body"), WarmUp(torch.device("cuda", 0), 64 << 20, 2, []):
        raise KeyError("of the body")
