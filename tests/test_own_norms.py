"""The notebook about norms of one's own: what it defines is short, agrees with the formulas
there, and would be found out if it did not."""

import json
import re

import equinox as eqx
import jax.numpy as jnp
import pytest

import eqx_norms as en

from .test_documents import ROOT, run


pytest.importorskip("optax")

NOTEBOOK = ROOT / "notebooks" / "a_norm_of_your_own.ipynb"


def read():
    """The imports and helpers, and by section the cells that define norms, and the one that
    compares them."""
    shared, norms, checks, section = [], {}, {}, 0
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            section = int((re.findall(r"^## (\d)", source) or [section])[0])
            continue
        match cell["metadata"].get("tags"):
            case ["norm"]:
                norms.setdefault(section, []).append(source)
            case ["check"]:
                checks[section] = source
            case _:
                shared.append(source)
    return shared, norms, checks


SHARED, NORMS, CHECKS = read()


def defined(section=None, old="", new=""):
    """What the notebook defines, with something changed in a section."""
    # A class takes its module from there.
    namespace: dict[str, object] = {"__name__": __name__}
    for source in SHARED:
        # `conftest.py` has said so. JAX 0.8 refuses to be told again.
        source = source.replace('jax.config.update("jax_num_cpu_devices", 8)', "")
        run(source, NOTEBOOK.name, namespace)
    for number, sources in NORMS.items():
        for source in sources:
            if number == section:
                source = source.replace(old, new)
            run(source, NOTEBOOK.name, namespace)
    return namespace


def test_each_has_thirty_lines_or_fewer():
    assert list(NORMS) == list(CHECKS) == [1, 2, 3, 4, 5, 6]
    for sources in NORMS.values():
        for source in sources:
            assert len([line for line in source.splitlines() if line]) <= 30


@pytest.mark.parametrize("section", CHECKS)
def test_agrees_with_its_formula(section):
    run(CHECKS[section], NOTEBOOK.name, defined())


# Section, what is changed, and which comparison finds it.
CHANGES = [
    (1, "1 / 3, 3)", "1 / 3, 4)", "batch 4, a batched array"),
    (1, "-5, 5)", "-6, 6)", "batch 4, a batched array"),
    (1, "jnp.where(warm, d, 0)", "d", "batch 1, a batched array"),
    (1, "r, d = jax.lax.stop_gradient(", "r, d = tuple(", "derivative"),
    (1, "0.01 * b", "0.02 * b", "running mean|batch 4"),
    (2, "range(1, x.ndim)", "range(2, x.ndim)", "a batched array"),
    (2, "reshape(4, 8)", "reshape(8, 4)", "examples of a vmap"),
    (2, "[0, 1], [2, 3]", "[0, 2], [1, 3]", "devices"),
    (3, "range(1,", "range(2,", "a convolution"),
    (3, "1e-10", "1e-6", "a convolution"),
    (4, "+ jnp.abs(more)", "", "space of 5 x 7"),
    (4, "jnp.abs(more)", "more", "space of 5 x 7"),
    (4, "subtract_mean=False, ", "", "space of 5 x 7"),
    (4, ", threshold)", ", 0)", "space of 5 x 7"),
    (5, "jnp.zeros_like", "jnp.ones_like", "at the start, the identity"),
    (5, "scale_offset=1.0", "scale_offset=0.0", "with values"),
    (5, "gate * ", "", "at the start, the identity"),
    (6, "epsilon=layer.eps", "epsilon=1e-2", "Equinox's BatchNorm in evaluation"),
    (6, "own.set(norm.index, old.running_stats(stats))", "own", "Equinox's BatchNorm"),
    (6, "not is_norm(node)", "True", "a norm has decayed"),
    (6, "not is_norm(node)", "False", "weight decay of a convolution"),
]


@pytest.mark.parametrize(("section", "old", "new", "found"), CHANGES)
def test_a_change_is_found_out(section, old, new, found):
    assert sum(source.count(old) for source in NORMS[section]) > 0
    with pytest.raises(AssertionError, match=f"^({found})"):
        run(CHECKS[section], NOTEBOOK.name, defined(section, old, new))


def test_what_takes_layers_of_the_library_says_so():
    """Nobody knows how a user's class lays out its features, or what it computes."""
    norm = defined()["FilterResponseNorm"](3)  # pyright: ignore[reportCallIssue]
    assert eqx.filter_jit(norm)(jnp.ones((3, 2, 2))).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"^to_flax_variables: needs a .*FilterResponse"):
        en.convert.to_flax_variables(norm)
    with pytest.raises(ValueError, match=r"^restore_norms: there is no norm to replace"):
        en.restore_norms([norm])
    with pytest.warns(UserWarning, match="FilterResponseNorm at model.0.: a class of its"):
        model = en.restore_norms([norm, en.LayerNorm(3)])
    assert eqx.tree_equal(model[0], norm)
    pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(ValueError, match=r"^to_torch_state_dict: needs a .*FilterResponse"):
        en.convert.to_torch_state_dict(norm)
    with pytest.raises(
        ValueError, match=r"^from_torch: `like` must be a layer of eqx_norms"
    ):
        en.convert.from_torch({}, like=norm)
