"""What conversion does where PyTorch is not installed."""

import sys

import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert


def test_state_dict_of_arrays():
    """As a file of arrays gives it; nothing of PyTorch is needed."""
    entries = {"weight": np.full(3, 2, np.float32), "bias": np.ones(3, np.float32)}
    layer = convert.from_torch(entries, like=en.LayerNorm(3))
    np.testing.assert_array_equal(layer.scale, entries["weight"])
    np.testing.assert_array_equal(layer.bias, entries["bias"])


def test_pytorch_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"to_torch_state_dict: needs PyTorch"):
        convert.to_torch_state_dict(en.LayerNorm(3))
