import pytest
import torch

from fastlm.train import speed

_measure = speed._measured_peak


@pytest.fixture(autouse=True)
def _short_peak_measurement(monkeypatch):
    """Dozens of runs a file: 0.2 s for measuring the machine at the start of each would be most of the time."""
    monkeypatch.setattr(speed, "_measured_peak", lambda device, dtype: _measure(device, torch.float32, seconds=0.001))
