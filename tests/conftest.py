import jax
import pytest


# Before the first use of JAX: eight devices for the tests of collectives.
jax.config.update("jax_num_cpu_devices", 8)
# What the library computes must not depend on the caller's leniency.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Where values are compared and compiling takes all the time, XLA does as little as it can.
QUICK = {
    "test_battery",
    "test_collectives",
    "test_convert_equinox",
    "test_convert_flax",
    "test_derivatives",
    "test_dtypes",
    "test_fold",
    "test_group_norm",
    "test_instance_norm",
    "test_masks",
    "test_parity_flax",
    "test_properties",
    "test_recalibrate",
    "test_sharding",
    "test_spectral_norm",
    "test_weight_norm",
}


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly(request):
    name = request.module.__name__.rpartition(".")[2]
    jax.config.update("jax_disable_most_optimizations", name in QUICK)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
