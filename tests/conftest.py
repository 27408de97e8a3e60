import jax
import pytest


# Before the first use of JAX: eight devices for the tests of collectives.
jax.config.update("jax_num_cpu_devices", 8)
# What the library computes must not depend on the caller's leniency.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# What is compiled as it is for users: where the last digits count, or the compiled program,
# or where running takes longer than compiling. Elsewhere XLA does as little as it can.
AS_FOR_USERS = {
    "test_accuracy",
    "test_benchmarks",
    "test_core",
    "test_cost",
    "test_documents",
    "test_exactness",
    "test_memory",
    "test_rows",
    "test_train_digits",
}


def is_as_for_users(item):
    return item.module.__name__.rpartition(".")[2] in AS_FOR_USERS


def pytest_configure(config):
    config.addinivalue_line("markers", "as_for_users: is compiled as it is for users")


def pytest_collection_modifyitems(items):
    for item in items:
        if is_as_for_users(item):
            item.add_marker("as_for_users")


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly(request):
    jax.config.update("jax_disable_most_optimizations", not is_as_for_users(request))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # Programs on a CPU keep memory mapped, of which Linux allows a process 65,530 pieces:
    # 8,600 after a quarter of the tests in one process, or 1,300 with this. Without it a
    # run of all of them ended in a crash of XLA 0.12, late and once.
    jax.clear_caches()
