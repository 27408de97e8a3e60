from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.nn.initializers import ones
from jaxtyping import PRNGKeyArray

from ._axes import canonicalize_axes, check_axes
from ._layer import AbstractExampleNorm
from ._moments import Reduction
from ._normalize import Inputs
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer


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

    _center: ClassVar[bool] = False

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
        reduction_axes: Axes = -1,
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
        - `epsilon`: added to the mean square. Not negative. With zero, positions that are
            zero come out as zero.
        - `dtype`: of the result. By default what the input and the scale promote to;
            `"input"` for the input's own, float32 for integers and booleans.
        - `param_dtype`: of the scale.
        - `use_scale`: whether there is a scale.
        - `scale_init`: a function `(key, shape, dtype) -> array` that makes it, as in
            `jax.nn.initializers`.
        - `reduction_axes`: the axes that the mean square is taken over.
        - `feature_axes`: the axes along which the scale varies. They need not be among
            the `reduction_axes`.
        - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap`
            or `jax.shard_map`: the mean square is taken over these too.
        - `axis_index_groups`: a list of lists of indices along the one `axis_name`, of
            equal size and together all of them: each group has a mean square of its own.
        - `use_fast_variance`: for the sake of Flax's interface. There is no mean to
            subtract, so the data is read once, and exactly, either way. (In half precision
            the sum of the squares must fit into float32: a thousand numbers of 5e17.)
        - `scale_offset`: added to the scale, the layer's or that of the call, in the
            precision of the statistics. Without either there is no scale.
        - `key`: a `jax.random` key for the initializers, if they need one.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        name = type(self).__name__
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        self.reduction_axes = check_axes(
            reduction_axes, layer=name, argument="reduction_axes"
        )
        self._set_common(
            num_features,
            self.feature_axes,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            scale_init=scale_init if use_scale else None,
            bias_init=None,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            scale_offset=scale_offset,
            key=key,
        )

    def _layout(self) -> tuple[str, tuple[int, ...]]:
        return "feature_axes", self.feature_axes

    def _reduction(self, inputs: Inputs) -> Reduction:
        axes = canonicalize_axes(
            self.reduction_axes,
            inputs.x.ndim,
            layer=type(self).__name__,
            argument="reduction_axes",
        )
        return Reduction(axes, inputs.compute_dtype)
