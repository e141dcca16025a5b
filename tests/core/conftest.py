"""Who computes packed layers in a test: the caller alone, or a team of three threads."""

import pytest
import torch


@pytest.fixture(params=[1, 3], ids=["alone", "three threads"])
def packed_threads(request):
    torch.ops.astrai_packed.use_threads(request.param)
    with torch.inference_mode():
        yield
    torch.ops.astrai_packed.use_threads(0)  # torch's number again
