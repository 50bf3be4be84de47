import pytest
import torch

from minrl.agents.backbones import scan_cpu


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    """Run a test on the compiled kernels, and on plain torch as where they are not available."""
    if request.param == "torch":
        monkeypatch.setattr(scan_cpu, "is_available", lambda *_: False)
    else:
        assert scan_cpu.is_available(torch.float32, "mingru", "g")
    return request.param
