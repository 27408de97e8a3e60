from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from ._checks import canonicalize_axes, check_axes, check_reduction_axes
from ._layer import AbstractExampleNorm
from ._statistics import Reduction
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class RMSNorm(AbstractExampleNorm):
    r"""Divides each example by the root mean square of its own features.

    $$y = \frac{x}{\sqrt{\mathbb{E}[|x|^2] + \varepsilon}} * \gamma$$

    The expectation is over `reduction_axes`, for every position along the other axes by
    itself; the scale $\gamma$ has one entry for each position along `feature_axes`. With
    `axis_name` the expectation is over that named axis as well, for features that are split
    over it.

    Take a batched array, whose leading axes are left alone, or one example inside
    `jax.vmap`: the two are the same.

    !!! example

        ```python
        norm = en.RMSNorm(16, scale_init=jax.nn.initializers.zeros, scale_offset=1.0)
        y = norm(jnp.ones((4, 16), jnp.bfloat16))
        ```

    !!! cite

        [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), with the
        parameters of Flax's `nnx.RMSNorm`.
    """

    _arguments: ClassVar[tuple[str, ...]] = ("feature_axes", "reduction_axes")
    _subtract_mean: ClassVar[bool] = False

    reduction_axes: tuple[int, ...] = eqx.field(static=True)
    feature_axes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        feature_axes: Axes = -1,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis, or a tuple with the size of each, in
            the order of `feature_axes`.
        - `epsilon`: added to the mean square. Not negative. If it is zero, and the mean
            square is below the smallest normal number, the result is zeros.
        - `dtype`, `param_dtype`, `use_scale`, `scale_init`, `reduction_axes`,
            `feature_axes`, `axis_name`, `axis_index_groups`, `scale_offset`, `key`: as in
            [`eqx_norms.LayerNorm`][].
        - `use_fast_variance`: for the sake of Flax's interface. There is no mean to
            subtract, so `x` is read once either way.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        name = type(self).__name__
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        self.reduction_axes = check_reduction_axes(
            reduction_axes, self.feature_axes, layer=name
        )
        self._set_common(
            num_features,
            self.feature_axes,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=False,
            use_scale=use_scale,
            bias_init=zeros,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            scale_offset=scale_offset,
            key=key,
        )

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        name, axes = type(self).__name__, self.reduction_axes
        return Reduction(
            canonicalize_axes(axes, len(shape), layer=name, argument="reduction_axes")
        )
