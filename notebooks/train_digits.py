"""Trains a small convolutional network on handwritten digits, once for each norm.

The network is written for one image, as is usual in Equinox, and `jax.vmap` makes it one
for a batch. The `axis_name` given to `jax.vmap` is what `BatchNorm` averages over. With
`--devices N` each batch is split over N devices and `BatchNorm` averages over them too, so
that the curves are those of one device.

`batch` has running statistics that can be used from the first epoch on, `batch-default` the
default ones, as in Flax. Both train alike; only evaluation differs.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


# Each with how it is drawn: a colour is a norm, a dashed line its default.
NORMS = {
    "none": "k-",
    "batch": "C4-",
    "batch-default": "C4--",
    "layer": "C3-",
    "rms": "C9-",
}
CHANNELS = (1, 16, 16, 32, 32, 32)
TRAIN_SIZE = 1440  # of 1797; the others are for the test
BATCH_SIZE = 120
LEARNING_RATE = 3e-3


# The command line. It comes before the imports that take seconds, so that `--help` and
# mistakes are answered at once.


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {least}, got {text}"
            )
        return value

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small network on handwritten digits, once for each norm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--norm", choices=("all", *NORMS), default="all", help="which to train with"
    )
    parser.add_argument(
        "--devices",
        type=whole_number(1),
        default=1,
        help="how many to split each batch over",
    )
    parser.add_argument("--epochs", type=whole_number(1), default=10, help="for each norm")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of weights and batches"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("train_digits.png"),
        help="the picture; one of this name is kept, and the new one numbered",
    )
    options = parser.parse_args(argv)
    if BATCH_SIZE % options.devices:
        parser.error(
            f"argument --devices: must divide the batch of {BATCH_SIZE}, "
            f"got {options.devices}"
        )
    folder = options.output.parent
    if options.output.suffix != ".png":
        parser.error(f"argument --output: must end in .png, got {options.output}")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"argument --output: cannot write to the folder {folder}")
    return options


if __name__ == "__main__":
    parse(None)  # `main` does it again, for those who import this.

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from tqdm import tqdm

import eqx_norms as en


# The network.


class NoNorm(eqx.Module):
    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        return x, state


def make_norm(norm: str, channels: int, axis_name: tuple[str, ...]) -> Any:
    """A layer for one image of shape `(channels, height, width)`."""
    if norm == "batch":
        return en.BatchNorm(
            channels, axis=0, momentum=0.9, debias=True, axis_name=axis_name
        )
    if norm == "batch-default":
        return en.BatchNorm(channels, axis=0, axis_name=axis_name)
    if norm == "layer":
        return en.LayerNorm(channels, reduction_axes=0, feature_axes=0)
    if norm == "rms":
        return en.RMSNorm(channels, reduction_axes=0, feature_axes=0)
    return NoNorm()


class Network(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: list[Any]
    head: eqx.nn.Linear

    def __init__(self, norm: str, axis_name: tuple[str, ...], *, key: PRNGKeyArray):
        *conv_keys, head_key = jax.random.split(key, len(CHANNELS))
        self.convs, self.norms = [], []
        for before, after, conv_key in zip(CHANNELS, CHANNELS[1:], conv_keys, strict=False):
            conv = eqx.nn.Conv2d(
                before,
                after,
                kernel_size=3,
                stride=2 if 1 < before < after else 1,
                padding=1,
                use_bias=not norm.startswith("batch"),  # BatchNorm would subtract it again
                key=conv_key,
            )
            self.convs.append(conv)
            self.norms.append(make_norm(norm, after, axis_name))
        self.head = eqx.nn.Linear(CHANNELS[-1], 10, key=head_key)

    def __call__(
        self, x: Float[Array, "1 8 8"], state: eqx.nn.State
    ) -> tuple[Float[Array, "10"], eqx.nn.State]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
            x = jax.nn.relu(x)
        return self.head(x.mean(axis=(1, 2))), state


# The training.


class Data(NamedTuple):
    images: Float[Array, "number 1 8 8"]
    labels: Int[Array, " number"]


class History(NamedTuple):
    loss: np.ndarray  # (epochs, batches)
    accuracy: np.ndarray  # (epochs,), on the test set
    running: list[en.RunningStats]  # of each BatchNorm, at the end
    seconds: float


def load_data() -> tuple[Data, Data]:
    """The images and labels to train with, and those to test with."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.images[order, None] / 8 - 1, jnp.float32)
    labels = jnp.asarray(digits.target[order], jnp.int32)
    return (
        Data(images[:TRAIN_SIZE], labels[:TRAIN_SIZE]),
        Data(images[TRAIN_SIZE:], labels[TRAIN_SIZE:]),
    )


def make_mesh(devices: int) -> Mesh | None:
    if devices == 1:
        return None
    found = jax.devices()
    if len(found) < devices:
        found = jax.devices("cpu")
    return Mesh(np.array(found[:devices]), ("devices",))


def make_step(optimizer: optax.GradientTransformation, mesh: Mesh | None):
    """One step of training; with a mesh, each device has its share of the batch."""

    def loss_fn(model, state, batch):
        forward = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        logits, state = forward(batch.images, state)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        loss = losses.mean()
        if mesh is not None:
            loss = jax.lax.pmean(loss, "devices")
        return loss, state

    def step(model, state, opt_state, batch):
        grad_fn = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (loss, state), grads = grad_fn(model, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    if mesh is not None:
        # `jax.shard_map`, for arguments that hold more than arrays. Model, state and
        # optimiser are the same on all devices; the batch is split along its first axis.
        step = en.filter_shard_map(
            step, mesh=mesh, in_specs=(P(), P(), P(), P("devices")), out_specs=P()
        )
    return eqx.filter_jit(step)


@eqx.filter_jit
def evaluate(model: Network, state: eqx.nn.State, data: Data) -> Float[Array, ""]:
    """The accuracy. With its running statistics BatchNorm needs no `axis_name`."""
    model = eqx.nn.inference_mode(model)
    logits, _ = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(data.images, state)
    return (logits.argmax(axis=-1) == data.labels).mean()


def train(
    norm: str, data: Data, test: Data, *, devices: int, epochs: int, seed: int
) -> History:
    start = time.perf_counter()
    mesh = make_mesh(devices)
    axis_name = ("batch",) if mesh is None else ("batch", "devices")
    model, state = eqx.nn.make_with_state(Network)(
        norm, axis_name, key=jax.random.key(seed)
    )
    optimizer = optax.adam(LEARNING_RATE)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    if mesh is not None:
        model, state, opt_state = eqx.filter_shard(
            (model, state, opt_state), NamedSharding(mesh, P())
        )
    step = make_step(optimizer, mesh)

    shuffle = np.random.default_rng(seed).permutation
    batches = TRAIN_SIZE // BATCH_SIZE
    loss = np.zeros((epochs, batches))
    accuracy = np.zeros(epochs)
    # `None`: no bar where standard error is no terminal. A line is printed there instead.
    with tqdm(total=epochs * batches, desc=f"{norm:>13}", unit="step", disable=None) as bar:
        for epoch in range(epochs):
            for i, chosen in enumerate(shuffle(TRAIN_SIZE).reshape(batches, -1)):
                batch = Data(data.images[chosen], data.labels[chosen])
                model, state, opt_state, value = step(model, state, opt_state, batch)
                loss[epoch, i] = value
                bar.update()
            accuracy[epoch] = evaluate(model, state, test)
            bar.set_postfix(
                loss=f"{loss[epoch].mean():.3f}", accuracy=f"{accuracy[epoch]:.1%}"
            )

    running = [
        layer.running_stats(state)
        for layer in model.norms
        if isinstance(layer, en.BatchNorm)
    ]
    history = History(loss, accuracy, running, time.perf_counter() - start)
    if bar.disable:
        print(
            f"{norm:>13}: loss {loss[-1].mean():.3f}, accuracy {accuracy[-1]:.1%}, "
            f"{history.seconds:.1f} seconds",
            file=sys.stderr,
            flush=True,
        )
    return history


# The results.


def print_table(histories: dict[str, History]) -> None:
    row = "{:13}  {:>20}  {:>19}  {:>16}  {:>15}  {:>7}".format
    print(
        row(
            "norm",
            "first-epoch accuracy",
            "last-epoch accuracy",
            "first-epoch loss",
            "last-epoch loss",
            "seconds",
        )
    )
    for norm, history in histories.items():
        print(
            row(
                norm,
                f"{history.accuracy[0]:.1%}",
                f"{history.accuracy[-1]:.1%}",
                f"{history.loss[0].mean():.5f}",
                f"{history.loss[-1].mean():.5f}",
                f"{history.seconds:.1f}",
            )
        )


def plot(histories: dict[str, History], output: Path) -> None:
    running = {norm: h.running for norm, h in histories.items() if h.running}
    figure = Figure(figsize=(10, 8 if running else 4), layout="constrained")
    grid = figure.add_gridspec(2 if running else 1, 2)

    loss, accuracy = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    for norm, history in histories.items():
        epochs = np.arange(1, len(history.loss) + 1)
        style = f"o{NORMS[norm]}"
        loss.plot(epochs, history.loss.mean(axis=1), style, markersize=4, label=norm)
        accuracy.plot(epochs, 100 * history.accuracy, style, markersize=4, label=norm)
    same = (
        ": batch-default is batch" if {"batch", "batch-default"} <= set(histories) else ""
    )
    loss.set(title=f"Training loss{same}", ylabel="mean cross-entropy", yscale="log")
    accuracy.set(title="Test accuracy", ylabel="per cent correct", ylim=(0, 102))
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    # One for both, above them: inside it would cover curves.
    figure.legend(
        *loss.get_legend_handles_labels(), loc="outside upper center", ncols=len(histories)
    )

    if running:
        norm, layers = next(iter(running.items()))
        axes = figure.add_subplot(grid[1, :])
        axes.axhline(0, color="black", linewidth=0.5)
        ticks, first = [], 0
        for stats in layers:
            mean, deviation = np.asarray(stats.mean), np.sqrt(stats.var)
            order = mean.argsort()
            x = first + np.arange(len(mean))
            axes.errorbar(
                x,
                mean[order],
                deviation[order],
                fmt=f"{NORMS[norm][:2]}o",
                markersize=3,
                elinewidth=1,
            )
            ticks.append(x.mean())
            first = x[-1] + 4
        axes.set_xticks(ticks, [f"layer {i}" for i, _ in enumerate(ticks, start=1)])
        axes.tick_params(axis="x", length=0)
        axes.set(
            title=f"What BatchNorm has learned ({norm}): running mean and deviation",
            xlabel="channels, by mean",
            ylabel="mean ± one standard deviation",
        )
    figure.savefig(output, dpi=100)


def unused(path: Path) -> Path:
    """The path, numbered if need be: an older picture is not overwritten."""
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.devices > 1:
        # Before the first use of JAX: the processor counts as so many devices.
        jax.config.update("jax_num_cpu_devices", options.devices)
    norms = list(NORMS) if options.norm == "all" else [options.norm]
    histories, code = {}, 0
    try:
        data, test = load_data()
        for norm in norms:
            histories[norm] = train(
                norm,
                data,
                test,
                devices=options.devices,
                epochs=options.epochs,
                seed=options.seed,
            )
    except KeyboardInterrupt:
        message = f"Interrupted: {len(histories)} of {len(norms)} networks were trained."
        print(message, file=sys.stderr)
        code = 130
    if histories:
        print_table(histories)
        output = unused(options.output)
        plot(histories, output)
        print(f"The curves are in {output}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
