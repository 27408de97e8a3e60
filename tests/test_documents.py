"""Every Python block of the README runs, in order, as its reader would run them."""

import pathlib
import re

import jax
import pytest


ROOT = pathlib.Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.S | re.M)


@pytest.mark.parametrize("name", ["README.md"])
def test_blocks_run(name):
    found = blocks(name)
    assert len(found) >= 4
    namespace = {}
    # The reader has JAX's defaults, not this suite's.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in found:
            exec(compile(block, name, "exec"), namespace)
    # The training loop of the README has learned a sum of four numbers.
    prediction, x = namespace["prediction"], namespace["x"]
    assert x.shape == (64, 4)
    assert abs(prediction[0] - x[0].sum()) < 1
