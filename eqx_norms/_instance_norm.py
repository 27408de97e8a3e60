from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from ._axes import other_axes
from ._layer import AbstractExampleNorm
from ._statistics import Reduction
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class InstanceNorm(AbstractExampleNorm):
    r"""Normalises each feature of each example by its own mean and variance; inside
    `jax.vmap`, where an array is one example, only with `batch_axes=()`.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    The expectations are over all axes but `batch_axes` and `feature_axes`, usually those of
    space; the scale $\gamma$ and the bias $\beta$ have one entry for each position along
    `feature_axes`. With `axis_name` the expectations are over that named axis as well, for
    space that is split over it. A mean of one position alone is refused: the result would
    be the bias.

    By default the first axis is the batch. An array does not say whether it has one: for
    one example without `batch_axes=()` its first axis is taken for the batch.

    !!! example

        ```python
        norm = en.InstanceNorm(16)
        y = norm(jnp.ones((2, 8, 8, 16)))

        # One example with its channels first, as Equinox's convolutions give it.
        norm = en.InstanceNorm(16, feature_axes=0, batch_axes=())
        y = jax.vmap(norm)(jnp.ones((2, 16, 8, 8)))
        ```

    !!! cite

        [Instance Normalization](https://arxiv.org/abs/1607.08022), with the parameters of
        Flax's `nnx.InstanceNorm`, and `batch_axes`.
    """

    _remedy: ClassVar[str] = (
        "It needs axes besides `batch_axes` and `feature_axes`. For one example, as inside "
        "`jax.vmap`, use `batch_axes=()`."
    )
    _one_position: ClassVar[str] = (
        "Give an input of more positions, or leave the layer out."
    )

    feature_axes: tuple[int, ...] = eqx.field(static=True)
    batch_axes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        batch_axes: Axes = 0,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis, or a tuple with the size of each, in
            the order of `feature_axes`.
        - `feature_axes`: the axes along which scale and bias vary.
        - `batch_axes`: the axes along which there are examples: the first, by default;
            `()` for a single example, as it is inside `jax.vmap`.
        - `epsilon`, `dtype`, `param_dtype`, `use_bias`, `use_scale`, `bias_init`,
            `scale_init`, `axis_name`, `axis_index_groups`, `use_fast_variance`,
            `scale_offset`, `key`: as in [`eqx_norms.LayerNorm`][].

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        check = self._check
        self.feature_axes = check.axes(feature_axes, "feature_axes")
        self.batch_axes = check.axes(batch_axes, "batch_axes")
        self._set_common(
            num_features,
            self.feature_axes,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            scale_offset=scale_offset,
            key=key,
        )

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        ndim = len(shape)
        batch_axes = self._check.batch_axes(ndim, self.batch_axes, feature_axes)
        return Reduction(other_axes((*batch_axes, *feature_axes), ndim))
