"""The `BatchNorm`s of a model: found, frozen and thawed."""

from typing import Any, TypeVar

from ._batch_norm import BatchNorm
from ._checks import Check
from ._trees import find_nodes, map_nodes, with_fields


Model = TypeVar("Model")


def freeze(model: Model) -> Model:
    """Has every [`eqx_norms.BatchNorm`][] in a model normalise with its running statistics
    and leave them alone, whatever `equinox.nn.inference_mode` or the call says.

    **Arguments:**

    - `model`: any PyTree, a single layer included.

    **Returns:**

    The model, with the field `frozen` of each of these layers `True`.

    **Raises:**

    `ValueError` if there is none.
    """
    return _set_frozen(model, True, Check("freeze"))


def unfreeze(model: Model) -> Model:
    """The opposite of [`eqx_norms.freeze`][]."""
    return _set_frozen(model, False, Check("unfreeze"))


def _set_frozen(model: Model, frozen: bool, check: Check) -> Model:
    find_batch_norms(model, check)
    return map_nodes(lambda layer: with_fields(layer, frozen=frozen), model, BatchNorm)


def find_batch_norms(model: Any, check: Check) -> dict[str, BatchNorm]:
    """Every `BatchNorm` in a model, which must have one, by path."""
    layers = find_nodes(model, BatchNorm)
    if not layers:
        raise check.error(
            "there is no `eqx_norms.BatchNorm` in this model. Those of `equinox.nn` become "
            "such by `eqx_norms.replace_norms`."
        )
    return layers
