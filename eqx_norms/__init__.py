from importlib import metadata as _metadata

from . import convert as convert
from ._bake import bake as bake
from ._batch_norm import BatchNorm as BatchNorm
from ._batch_norm import freeze as freeze
from ._batch_norm import unfreeze as unfreeze
from ._fold import fold_batch_norm as fold_batch_norm
from ._fold import fold_batch_norms as fold_batch_norms
from ._group_norm import GroupNorm as GroupNorm
from ._instance_norm import InstanceNorm as InstanceNorm
from ._layer import AbstractNorm as AbstractNorm
from ._layer_norm import LayerNorm as LayerNorm
from ._recalibrate import recalibrate as recalibrate
from ._rms_norm import RMSNorm as RMSNorm
from ._running import RunningStats as RunningStats
from ._shard_map import filter_shard_map as filter_shard_map
from ._spectral_norm import SpectralNorm as SpectralNorm
from ._spectral_norm import SpectralStats as SpectralStats
from ._standardize import Moments as Moments
from ._standardize import moments as moments
from ._standardize import standardize as standardize
from ._weight_norm import WeightNorm as WeightNorm
from .convert import replace_norms as replace_norms


try:
    __version__ = _metadata.version("eqx-norms")
except _metadata.PackageNotFoundError:  # A copy of the sources that nobody installed.
    __version__ = "unknown"
