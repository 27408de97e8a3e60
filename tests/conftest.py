import jax


# Before the first use of JAX: eight devices for the tests of collectives.
jax.config.update("jax_num_cpu_devices", 8)
# What the library computes must not depend on the caller's leniency.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
