import collections
import functools
import itertools

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
    "test_accuracy_in_every_way",
    "test_all_reduces",
    "test_as_users_compile",
    "test_exactness",
    "test_memory",
    "test_programs",
    "test_rows",
    "test_train_digits",
}
# These halve the time of what is left, most of which XLA's compiler takes.
QUICK_OPTIONS = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def is_as_for_users(item):
    return item.module.__name__.rpartition(".")[2] in AS_FOR_USERS


def digits(number, sizes):
    """The indices, in lists of these sizes, of a row of their product."""
    for size in sizes:
        number, digit = divmod(number, size)
        yield digit


def pick(items):
    """Of a test that is marked `every(n)` those combinations of its parameters whose
    indices, each in its own list, add up to a multiple of n. Of three lists or more, all
    pairs of values are then tested; of two, each value with one in n of the others."""
    numbers = collections.defaultdict(itertools.count)
    for item in items:
        if marker := item.get_closest_marker("every"):
            # The list of the decorator on top changes fastest.
            lists = [mark.args[1] for mark in item.iter_markers("parametrize")]
            number = next(numbers[item.parent, item.originalname])
            if (
                sum(digits(number, [len(values) for values in lists[::-1]]))
                % marker.args[0]
            ):
                continue
        yield item


@pytest.hookimpl(tryfirst=True)  # Before `-k` chooses.
def pytest_collection_modifyitems(items):
    items[:] = pick(items)
    for item in items:
        if is_as_for_users(item):
            item.add_marker("as_for_users")


@pytest.fixture(scope="session")
def quick_options():
    """Those of the options that this XLA knows."""

    def is_known(name, value):
        f = jax.jit(lambda x: x, compiler_options={name: value})
        try:
            f.lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in QUICK_OPTIONS.items() if is_known(name, value)}


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly(request, quick_options):
    """Or as for users. The variable `XLA_FLAGS` would be for all of a process, and would
    end it where XLA does not know a flag. JAX has no setting for the options of all.
    """
    if is_as_for_users(request):
        yield
    else:
        from jax._src import compiler

        make = compiler.get_compile_options

        @functools.wraps(make)
        def quick(*args, env_options_overrides=None, **kwargs):
            options = {**quick_options, **(env_options_overrides or {})}
            return make(*args, env_options_overrides=options, **kwargs)

        jax.config.update("jax_disable_most_optimizations", True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "get_compile_options", quick)
            yield
        jax.config.update("jax_disable_most_optimizations", False)
    # Programs on a CPU keep memory mapped, of which Linux allows a process 65,530 pieces:
    # 8,600 after a quarter of the tests in one process, or 1,300 with this. Without it a
    # run of all of them ended in a crash of XLA 0.12, late and once. And what is compiled
    # in one way must not serve in the other.
    jax.clear_caches()
