"""What jax2onnx makes of the layers, run by onnxruntime."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import all_layers, call, normal, randomize, step


jax2onnx = pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(autouse=True)
def implicit_promotion():
    """JAX's defaults; and while it traces, jax2onnx puts functions of its own in the place
    of JAX's, which must not stay in JAX's caches."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.clear_caches()


# Of its own `maximum`, jax2onnx says that it is in float64.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@pytest.mark.parametrize("batch", [4, "batch"], ids=["fixed", "symbolic"])
@all_layers
def test_exported(case, batch):
    """In evaluation, with parameters and statistics at random."""
    layer, state = case.build(8)
    layer = randomize(layer)
    _, state = step(layer, state, 3 * normal(0, (4, 6, 8)) + 1)
    layer = eqx.nn.inference_mode(layer)
    # Far from zero, where squares would lose what is left of float32.
    x = normal(1, (4, 6, 8)) + 100
    wanted = call(layer, state, x)
    jax.clear_caches()
    shape = jax.ShapeDtypeStruct((batch, 6, 8), jnp.float32)
    model = jax2onnx.to_onnx(lambda x: call(layer, state, x), [shape])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: np.asarray(x)})
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
