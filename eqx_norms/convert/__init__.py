"""Layers and models of other libraries, carried over with weights and state."""

from ._equinox import from_equinox as from_equinox
from ._equinox import replace_norms as replace_norms
from ._flax import from_flax as from_flax
from ._flax import to_flax_variables as to_flax_variables
from ._to_equinox import restore_norms as restore_norms
from ._to_equinox import to_equinox as to_equinox
from ._torch import from_torch as from_torch
from ._torch import to_torch_state_dict as to_torch_state_dict
