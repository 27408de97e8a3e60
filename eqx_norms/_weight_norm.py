import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jax.nn.initializers import ones
from jaxtyping import Array, Inexact, PRNGKeyArray

from ._axes import feature_shape, to_feature_order
from ._dtypes import promote
from ._layer import init_affine, split_key
from ._standardize import compute
from ._statistics import Inputs, Reduction, Settings, abs_square
from ._types import Axes, DTypeLike, Initializer
from ._wrapped import AbstractWrapper, Layer, is_stateful


class WeightNorm(AbstractWrapper[Layer]):
    r"""Calls a layer with weights of a length of their own, apart from their direction.

    $$w = g * \frac{v}{\sqrt{\sum |v|^2 + \varepsilon}}$$

    $v$ is the wrapped layer's weight, which stays as it is; what is normalised is a copy,
    made at each call. The sum is over all axes but `feature_axes`, and the scale $g$ has
    one entry for each position along these.

    !!! example

        ```python
        linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
        layer = en.WeightNorm(linear, scale_init="norm")
        y = layer(jnp.ones(3))
        ```

    !!! cite

        [Weight Normalization](https://arxiv.org/abs/1602.07868), with the parameters of
        Flax's `nnx.WeightNorm`.
    """

    scales: tuple[Inexact[Array, "..."], ...] | None

    def __init__(
        self,
        layer: Layer,
        *,
        feature_axes: Axes | None = 0,
        use_scale: bool = True,
        scale_init: Initializer | Literal["norm"] = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        where: Callable[[Layer], Any] | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `layer`: any layer. One that has a state is called, and answers, with it.
        - `feature_axes`: the axes of a weight along which lengths differ: 0, by default,
            the outputs of Equinox's layers (of Flax's they are the last axis, and so is
            Flax's default). `None` for one length for the whole weight.
        - `use_scale`: whether lengths are learned; without, they are one.
        - `scale_init`: a function `(key, shape, dtype) -> array` that makes the scale of a
            weight, as in `jax.nn.initializers`. Or `"norm"` for the weight's own lengths,
            as in the paper and PyTorch: then the wrapped layer computes at first what the
            layer does.
        - `epsilon`: added to the squared length. Not negative. Zeros stay zeros.
        - `dtype`: of the weights that the layer is called with. By default what the weight
            and its scale promote to; `"input"` for that of the weight, which is what is
            normalised here. The arithmetic is in float32 or wider.
        - `param_dtype`: of the scales.
        - `where`: a function that picks one weight or several out of the layer, as in
            `equinox.tree_at`. By default each leaf that is called `weight` and has two
            dimensions or more: not the vectors of norms and the like.
        - `key`: a `jax.random` key for the initializer, if it needs one.

        **Raises:**

        `ValueError` where one of these is not as described, or a weight has no axis but
        `feature_axes`.
        """
        check = self._check
        weights = self._set_common(
            layer,
            where,
            feature_axes=() if feature_axes is None else feature_axes,
            epsilon=epsilon,
            dtype=dtype,
        )
        use_scale = check.flag(use_scale, "use_scale")
        if isinstance(scale_init, str) and (scale_init != "norm" or not use_scale):
            raise check.error(
                f"`scale_init` must be an initializer, or with `use_scale=True` "
                f'"norm", got {scale_init!r} and `use_scale={use_scale}`.'
            )
        number = len(weights)
        keys = [None] * number if key is None else split_key(key, number, check=check)
        scales = []
        for weight, key in zip(weights, keys, strict=True):
            axes, _ = self._reduction(weight)
            init = scale_init
            if init == "norm":
                init = lambda key, shape, dtype, weight=weight: self._norm(weight, dtype)  # noqa: E731
            scale, _ = init_affine(
                feature_shape(weight.shape, axes),
                param_dtype,
                key,
                scale_init=init,
                bias_init=None,
                check=check,
            )
            scales.append(scale)
        self.scales = tuple(scales) if use_scale else None

    def is_stateful(self) -> bool:
        return is_stateful(self.layer)

    def _reduction(self, weight: Array) -> tuple[tuple[int, ...], Reduction]:
        """The feature axes, and what lengths are over."""
        axes, others = self._axes(weight)
        if not others:
            raise self._check.error(
                f"a weight of shape {weight.shape} has no axis left to take its length "
                f"over besides `feature_axes={self.feature_axes}`. Choose others, or other "
                "weights with `where`."
            )
        return axes, Reduction(others)

    # The length is the root mean square times the root of how many are averaged.

    def _norm(self, weight: Array, dtype: np.dtype) -> Array:
        axes, reduction = self._reduction(weight)
        wide = weight.astype(promote(weight.dtype, jnp.float32))
        square = reduction.sum(abs_square(wide)) + self.epsilon
        return to_feature_order(jnp.sqrt(square), axes).astype(dtype)

    def _normalized(self, weight: Array, scale: Array | None) -> Array:
        axes, reduction = self._reduction(weight)
        size = max(reduction.size(weight.shape), 1)
        dtype = self._check.dtype_of(self.dtype, weight, scale)
        wide = promote(weight.dtype, dtype, jnp.float32)
        length = jnp.ones((), wide) if scale is None else scale.astype(wide)
        settings = Settings(
            reduction, axes, dtype, self.epsilon / size, subtract_mean=False
        )
        inputs = Inputs(weight, scale=(length / math.sqrt(size),))
        return compute(settings, inputs)

    @jax.named_scope("eqx_norms.WeightNorm")
    def __call__(
        self, x: Any, *args: Any, key: PRNGKeyArray | None = None, **kwargs: Any
    ) -> Any:
        """**Arguments:**

        - `x`, and all others: handed to the layer. `key` only if there is one.

        **Returns:**

        What the layer returns.

        **Raises:**

        What the layer raises.
        """
        new = map(self._normalized, self._weights(), self._own())
        return self._call(new, x, *args, key=key, **kwargs)

    def _own(self, state: State | None = None) -> tuple[Array | None, ...]:
        del state
        if self.scales is None:
            return (None,) * len(self.weights)
        return tuple(map(jnp.asarray, self.scales))
