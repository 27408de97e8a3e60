from ._batch_norm import BatchNorm as BatchNorm
from ._layer_norm import LayerNorm as LayerNorm
from ._rms_norm import RMSNorm as RMSNorm
from ._running import RunningStats as RunningStats
