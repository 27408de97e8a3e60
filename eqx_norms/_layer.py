"""The base classes of the five norms of inputs: fields, checks, and the call of all but
`BatchNorm`."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, Shaped

from ._checks import Check, as_tuple
from ._dtypes import ResultDType
from ._names import AnswersNames
from ._standardize import compute, prepare
from ._state import check_optional_state
from ._statistics import Inputs, Reduction, Settings, Statistics
from ._types import AnyArray, Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


def split_key(key: PRNGKeyArray, number: int, *, check: Check) -> list[PRNGKeyArray]:
    try:
        return list(jax.random.split(key, number))
    except (TypeError, ValueError):
        raise check.error(
            f"`key` must be a single random key, got {key!r}. Make one with "
            "`jax.random.key(0)`, for example."
        ) from None


def init_affine(
    shape: Shape,
    dtype: DTypeLike,
    key: PRNGKeyArray | None,
    *,
    scale_init: Initializer | None,
    bias_init: Initializer | None,
    check: Check,
) -> tuple[Array | None, Array | None]:
    """Scale and bias, each `None` without an initializer."""
    keys = (None, None) if key is None else split_key(key, 2, check=check)
    dtype = check.dtype(dtype, "param_dtype")
    return (
        _init(scale_init, shape, dtype, keys[0], check=check, argument="scale_init"),
        _init(bias_init, shape, dtype, keys[1], check=check, argument="bias_init"),
    )


def _init(
    init: Initializer | None,
    shape: Shape,
    dtype: np.dtype,
    key: PRNGKeyArray | None,
    *,
    check: Check,
    argument: str,
) -> Array | None:
    if init is None:
        return None
    if not callable(init):
        raise check.error(
            f"`{argument}` must be a function `(key, shape, dtype) -> array`, as in "
            f"`jax.nn.initializers`, got one of type {type(init).__name__}."
        )
    try:
        value = jnp.asarray(init(key, shape, dtype))
    except Exception as error:
        if key is not None:
            raise
        raise check.error(
            f"`{argument}` failed without a random key. If it draws random numbers, give "
            "the layer one: `key=jax.random.key(...)`."
        ) from error
    if value.shape != shape or value.dtype != dtype:
        raise check.error(
            f"`{argument}` must return shape {shape} and dtype {dtype}, got shape "
            f"{value.shape} and dtype {value.dtype}."
        )
    return value.astype(dtype)  # not weakly typed, whatever the initializer returned


class AbstractNorm(AnswersNames, eqx.Module):
    """The base class of `BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` and
    `InstanceNorm`: scale, bias, and the settings that they share. `isinstance` tells them
    from other layers by it. A norm of your own that is derived from it needs a `__call__`,
    and these fields, which `super().__init__` sets.

    [`eqx_norms.WeightNorm`][] and [`eqx_norms.SpectralNorm`][] are not derived from it:
    each wraps another layer, and normalises its weights.

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

    # The argument, and field, that says along which axes the features are; then those that
    # must change with it. Errors name them all.
    _axes_arguments: ClassVar[tuple[str, ...]] = ("feature_axes",)
    _subtract_mean: ClassVar[bool] = True
    # What to do where no axis is left to take statistics over.
    _remedy: ClassVar[str] = "Name one in `reduction_axes`, or an `axis_name`."
    # What to do where statistics are of one position each, if that is refused.
    _one_position: ClassVar[str] = ""

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
        """Sets the fields of `AbstractNorm`, from within a constructor, and returns the
        feature shape."""
        check = self._check
        shape = check.num_features(num_features, feature_axes, self._axes_arguments)
        self.num_features = shape if isinstance(num_features, Sequence) else shape[0]
        use_bias = check.flag(use_bias, "use_bias")
        use_scale = check.flag(use_scale, "use_scale")
        self.scale, self.bias = init_affine(
            shape,
            param_dtype,
            key,
            scale_init=scale_init if use_scale else None,
            bias_init=bias_init if use_bias else None,
            check=check,
        )
        self.epsilon = check.epsilon(epsilon)
        self.dtype = check.result_dtype(dtype)
        self.axis_name = check.names(axis_name)
        self.axis_index_groups = check.groups(axis_index_groups, self.axis_name)
        self.use_fast_variance = check.flag(use_fast_variance, "use_fast_variance")
        self.scale_offset = check.scale_offset(scale_offset)
        return shape

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Normalises an array. Each layer says what else it takes and returns."""

    def _features(self) -> Shape | None:
        """The feature shape that `x` must have; inside `shard_map`, where scale and bias
        may be split, that of this device's part. `None` if any will do."""
        for parameter in (self.scale, self.bias):
            if parameter is not None:
                return parameter.shape
        # Without parameters nothing tells how the features are split over devices.
        return as_tuple(self.num_features) if self.axis_name is None else None

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        """The axes that statistics of an input of this shape are taken over."""
        raise NotImplementedError  # A norm of a user's own may do without.

    def _prepare(
        self,
        x: AnyArray,
        mask: AnyArray | None,
        scale: AnyArray | None,
        bias: AnyArray | None,
        features: Shape | None,
        *,
        given: Statistics | None = None,
        allow_one_position: bool = False,
    ) -> tuple[Settings, Inputs]:
        """As `prepare`, with the layer's settings. `features` is the feature shape that is
        required, `None` if any will do. `allow_one_position` says that statistics of one
        position each are not refused."""
        check, argument = self._check, self._axes_arguments[0]
        x = check.array(x, "x")
        axes = check.axes_in(x.ndim, as_tuple(getattr(self, argument)), argument)
        if features is not None:
            check.features(features, x.shape, axes, self._axes_arguments)
        return prepare(
            x,
            self._reduction(x.shape, axes),
            check=check,
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
            one_position="" if allow_one_position else self._one_position,
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
        check_optional_state(state, check=self._check)
        with jax.named_scope(f"eqx_norms.{type(self).__name__}"):
            y = compute(*self._prepare(x, mask, scale, bias, self._features()))
        return y if state is None else (y, state)


class AbstractAxesNorm(AbstractExampleNorm):
    """A layer with `feature_axes` and `reduction_axes`."""

    _axes_arguments: ClassVar[tuple[str, ...]] = ("feature_axes", "reduction_axes")

    reduction_axes: tuple[int, ...] = eqx.field(static=True)
    feature_axes: tuple[int, ...] = eqx.field(static=True)

    def _set_axes(self, feature_axes: Axes, reduction_axes: Axes | None) -> None:
        """Sets both fields, from within a constructor."""
        check = self._check
        self.feature_axes = check.axes(feature_axes, "feature_axes")
        self.reduction_axes = check.reduction_axes(reduction_axes, self.feature_axes)

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        axes = self.reduction_axes
        return Reduction(self._check.axes_in(len(shape), axes, "reduction_axes"))
