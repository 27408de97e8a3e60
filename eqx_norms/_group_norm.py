import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from ._axes import other_axes
from ._layer import AbstractExampleNorm
from ._statistics import Reduction
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class GroupNorm(AbstractExampleNorm):
    r"""Normalises each group of features of each example by its own mean and variance;
    inside `jax.vmap`, where an array is one example, only with `batch_axes=()`.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    The features are divided into groups of neighbours. The expectations are over a group
    and over all axes but `batch_axes`; the scale $\gamma$ and the bias $\beta$ have one
    entry for each feature. With `axis_name` the expectations are over that named axis as
    well, for space that is split over it. One feature at one position is its own mean: then
    the result is the bias.

    By default the first axis is the batch. An array does not say whether it has one: for
    one example without `batch_axes=()` its first axis is taken for the batch.

    !!! example

        ```python
        norm = en.GroupNorm(16, num_groups=4)
        y = norm(jnp.ones((2, 8, 8, 16)))

        # One example with its channels first, as Equinox's convolutions give it.
        norm = en.GroupNorm(16, num_groups=4, feature_axis=0, batch_axes=())
        y = jax.vmap(norm)(jnp.ones((2, 16, 8, 8)))
        ```

    !!! cite

        [Group Normalization](https://arxiv.org/abs/1803.08494), with the parameters of
        Flax's `nnx.GroupNorm`, and `feature_axis` and `batch_axes`.
    """

    _axes_arguments: ClassVar[tuple[str, ...]] = ("feature_axis",)

    num_groups: int = eqx.field(static=True)
    reduction_axes: tuple[int, ...] | None = eqx.field(static=True)
    feature_axis: int = eqx.field(static=True)
    batch_axes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        feature_axis: int = -1,
        batch_axes: Axes = 0,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis.
        - `num_groups`: how many groups the features are divided into.
        - `group_size`: how many features are in a group, in place of `num_groups`, which
            then must be `None`.
        - `reduction_axes`: the axes that mean and variance are taken over, the feature axis
            among them; by default all but `batch_axes`.
        - `feature_axis`: the axis along which there are features: the last, by default; 0
            for one example of Equinox's convolutions.
        - `batch_axes`: the axes along which there are examples: the first, by default;
            `()` for a single example, as it is inside `jax.vmap`.
        - `epsilon`, `dtype`, `param_dtype`, `use_bias`, `use_scale`, `bias_init`,
            `scale_init`, `axis_name`, `axis_index_groups`, `use_fast_variance`,
            `scale_offset`, `key`: as in [`eqx_norms.LayerNorm`][].

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        check = self._check
        feature_axis = check.integer(feature_axis, "feature_axis")
        (size,) = check.num_features(num_features, (feature_axis,))
        if (num_groups is None) == (group_size is None):
            raise check.error(
                "give `num_groups`, or `group_size` and `num_groups=None`, got "
                f"`num_groups={num_groups}` and `group_size={group_size}`."
            )
        if num_groups is not None:
            divisor = check.integer(num_groups, "num_groups")
        else:
            assert group_size is not None
            divisor = check.integer(group_size, "group_size")
        if divisor < 1 or size % divisor:
            raise check.error(
                f"`num_features={num_features}` cannot be divided evenly by "
                f"`num_groups={num_groups}`, `group_size={group_size}`. Give a positive "
                f"number that divides it, {math.gcd(size, divisor)} for example. The "
                "features come first, then the groups: the reverse of PyTorch and Equinox."
            )
        self.num_groups = size // divisor if num_groups is None else divisor
        self.reduction_axes = (
            None if reduction_axes is None else check.axes(reduction_axes, "reduction_axes")
        )
        self.feature_axis = feature_axis
        self.batch_axes = check.axes(batch_axes, "batch_axes")
        self._set_common(
            num_features,
            (feature_axis,),
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
        check, ndim, (feature_axis,) = self._check, len(shape), feature_axes
        if self.reduction_axes is None:
            batch_axes = check.batch_axes(ndim, self.batch_axes, feature_axes)
            axes = other_axes((*batch_axes, feature_axis), ndim)
        else:
            axes = check.axes_in(ndim, self.reduction_axes, "reduction_axes")
            if feature_axis not in axes:
                raise check.error(
                    f"`reduction_axes={self.reduction_axes}` must have the "
                    f"`feature_axis={self.feature_axis}` among them, for an input of shape "
                    f"{shape}."
                )
            axes = tuple(axis for axis in axes if axis != feature_axis)
        return Reduction(axes, (feature_axis, self.num_groups))
