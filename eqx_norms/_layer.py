"""What the layers have in common: fields, checks, and the call of all but `BatchNorm`."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, overload

import equinox as eqx
import jax
from equinox.nn import State
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, Shaped

from ._affine import init_affine
from ._checks import (
    as_array,
    as_tuple,
    canonicalize_axes,
    check_epsilon,
    check_features,
    check_flag,
    check_groups,
    check_names,
    check_num_features,
    check_result_dtype,
    check_scale_offset,
)
from ._dtypes import ResultDType
from ._names import AnswersNames
from ._standardize import compute, prepare
from ._state import check_optional_state
from ._statistics import Inputs, Reduction, Settings, Statistics
from ._types import AnyArray, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class AbstractNorm(AnswersNames, eqx.Module):
    """What `BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` and `InstanceNorm` are derived
    from, to tell them from other layers: scale, bias, and the settings that each has.

    [`eqx_norms.WeightNorm`][] and [`eqx_norms.SpectralNorm`][] are none of these: in them
    are the weights of other layers.

    !!! example

        ```python
        model = [eqx.nn.Linear(4, 4, key=jax.random.key(0)), en.LayerNorm(4)]

        # For `optax.adamw(..., mask=decayed)`: all parameters but those of norms.
        is_norm = lambda node: isinstance(node, en.AbstractNorm)
        params = eqx.filter(model, eqx.is_inexact_array)
        decayed = jax.tree.map(lambda node: not is_norm(node), params, is_leaf=is_norm)
        ```
    """

    scale: Inexact[Array, "*features"] | None
    bias: Inexact[Array, "*features"] | None
    num_features: int | tuple[int, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    scale_offset: float = eqx.field(static=True)
    # Equinox prints a field with a default only where it differs from that.
    dtype: ResultDType = eqx.field(static=True, default=None, kw_only=True)
    axis_name: tuple[Any, ...] | None = eqx.field(static=True, default=None, kw_only=True)
    axis_index_groups: tuple[tuple[int, ...], ...] | None = eqx.field(
        static=True, default=None, kw_only=True
    )
    use_fast_variance: bool = eqx.field(static=True, default=True, kw_only=True)

    # The arguments, and fields, that say along which axes the features are.
    _arguments: ClassVar[tuple[str, ...]] = ("feature_axes",)
    _subtract_mean: ClassVar[bool] = True
    # What to do where no axis is left to take statistics over.
    _remedy: ClassVar[str] = "Name one in `reduction_axes`, or an `axis_name`."
    # What to do where statistics are of one position each, if that is refused.
    _alone: ClassVar[str] = ""

    def _set_common(
        self,
        num_features: int | tuple[int, ...],
        feature_axes: tuple[int, ...],
        *,
        epsilon: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        use_bias: bool,
        use_scale: bool,
        bias_init: Initializer,
        scale_init: Initializer,
        axis_name: AxisName,
        axis_index_groups: AxisIndexGroups,
        use_fast_variance: bool,
        scale_offset: float,
        key: PRNGKeyArray | None,
    ) -> Shape:
        """Sets these fields, from within a constructor, and returns the feature shape."""
        name = type(self).__name__
        shape = check_num_features(num_features, feature_axes, self._arguments, layer=name)
        self.num_features = shape if isinstance(num_features, Sequence) else shape[0]
        use_bias = check_flag(use_bias, layer=name, argument="use_bias")
        use_scale = check_flag(use_scale, layer=name, argument="use_scale")
        self.scale, self.bias = init_affine(
            shape,
            param_dtype,
            key,
            scale_init=scale_init if use_scale else None,
            bias_init=bias_init if use_bias else None,
            layer=name,
        )
        self.epsilon = check_epsilon(epsilon, layer=name)
        self.dtype = check_result_dtype(dtype, layer=name)
        self.axis_name = check_names(axis_name, layer=name)
        self.axis_index_groups = check_groups(axis_index_groups, self.axis_name, layer=name)
        self.use_fast_variance = check_flag(
            use_fast_variance, layer=name, argument="use_fast_variance"
        )
        self.scale_offset = check_scale_offset(scale_offset, layer=name)
        return shape

    def _features(self) -> Shape | None:
        """The feature shape that `x` must have; inside `shard_map`, where scale and bias
        may be split, that of this device's part. `None` if any will do."""
        for parameter in (self.scale, self.bias):
            if parameter is not None:
                return parameter.shape
        # Without parameters nothing tells how the features are split over devices.
        return as_tuple(self.num_features) if self.axis_name is None else None

    def _layout(self) -> tuple[str, tuple[int, ...]]:
        """What the layer calls its feature axes, and which they are."""
        return self._arguments[0], as_tuple(getattr(self, self._arguments[0]))

    @abstractmethod
    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        """What the statistics of an input of this shape are over."""

    def _prepare(
        self,
        x: AnyArray,
        mask: AnyArray | None,
        scale: AnyArray | None,
        bias: AnyArray | None,
        features: Shape | None,
        *,
        given: Statistics | None = None,
        may_be_alone: bool = False,
    ) -> tuple[Settings, Inputs]:
        """Checks the arrays of a call. Returns what `compute` takes. `features` is the
        feature shape that is required, `None` if any will do. `may_be_alone` says that
        statistics of one position each are not refused."""
        name = type(self).__name__
        argument, axes = self._layout()
        x = as_array(x, layer=name, argument="x")
        axes = canonicalize_axes(axes, x.ndim, layer=name, argument=argument)
        if features is not None:
            check_features(features, x.shape, axes, self._arguments, layer=name)
        return prepare(
            x,
            self._reduction(x.shape, axes),
            layer=name,
            mask=mask,
            scale=(self.scale, scale),
            bias=(self.bias, bias),
            feature_axes=axes,
            given=given,
            dtype=self.dtype,
            epsilon=self.epsilon,
            scale_offset=self.scale_offset,
            subtract_mean=self._subtract_mean,
            use_fast_variance=self.use_fast_variance,
            names=self.axis_name,
            groups=self.axis_index_groups,
            remedy=self._remedy,
            alone="" if may_be_alone else self._alone,
        )


class AbstractExampleNorm(AbstractNorm):
    """A layer without running statistics: it normalises in evaluation as in training."""

    @overload
    def __call__(
        self,
        x: AnyArray,
        state: None = None,
        *,
        mask: AnyArray | None = None,
        scale: AnyArray | None = None,
        bias: AnyArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: AnyArray,
        state: State,
        *,
        mask: AnyArray | None = None,
        scale: AnyArray | None = None,
        bias: AnyArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, State]: ...

    def __call__(
        self,
        x: Shaped[AnyArray, "*shape"],
        state: State | None = None,
        *,
        mask: Bool[AnyArray, "..."] | None = None,
        scale: Inexact[AnyArray, "..."] | None = None,
        bias: Inexact[AnyArray, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Inexact[Array, "*shape"] | tuple[Inexact[Array, "*shape"], State]:
        """**Arguments:**

        - `x`: an array of any rank.
        - `state`: returned as it is, so that the layer can stand where a
            [`eqx_norms.BatchNorm`][] stood.
        - `mask`: boolean, broadcastable to `x`: `mask[..., None]` if it has no axis of
            features. Where it is `False`, `x` does not count for the statistics, whatever
            it holds. It is normalised all the same; what is not finite there counts as
            zero. Where nothing counts, the bias comes out.
        - `scale`, `bias`: arrays that are added, for this call, to the layer's own scale
            and bias, or used alone if the layer has none. One of the feature shape is laid
            along the feature axes; one of another shape is broadcast to `x`.
        - `key`: ignored; every layer of Equinox takes one.

        **Returns:**

        An array of the shape of `x`; with `state`, a pair of it and `state`.

        **Raises:**

        `ValueError` if an argument does not fit the layer or `x`, `NameError` if
        `axis_name` is bound nowhere.
        """
        del key
        check_optional_state(state, layer=type(self).__name__)
        with jax.named_scope(f"eqx_norms.{type(self).__name__}"):
            y, _ = compute(*self._prepare(x, mask, scale, bias, self._features()))
        return y if state is None else (y, state)
