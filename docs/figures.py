"""Draws the picture of `how-it-works.md`: `python docs/figures.py`.

How far the variance of float32 data is from that in float64 of the same data. The two forms
of eqx_norms are read from the running statistics of a `BatchNorm` that keeps nothing of the
old ones; the third is the difference that it does not use.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import eqx_norms as en


HERE = Path(__file__).parent
FEATURES, POSITIONS = 256, 4096
MEANS = 10.0 ** np.arange(0, 5.01, 0.5)
DISTANCES = 10.0 ** np.arange(0, 4.01, 0.5)

# As paths and without a date or random names, so that equal figures are equal files.
matplotlib.rcParams |= {"svg.hashsalt": "eqx_norms", "font.size": 10}


def about_zero(x):
    return jnp.maximum(jnp.mean(x * x, 0) - jnp.mean(x, 0) ** 2, 0)


def of_batch_norm(use_fast_variance):
    norm, state = eqx.nn.make_with_state(en.BatchNorm)(
        FEATURES, momentum=0.0, use_fast_variance=use_fast_variance
    )
    return lambda x: norm.running_stats(norm(x, state)[1]).var


FORMS = {
    "$E[x^2] - E[x]^2$": ("C5", about_zero),
    "about a position": ("C6", of_batch_norm(True)),
    "about the mean": ("C8", of_batch_norm(False)),
}


def draw_variance():
    z = np.random.default_rng(0).standard_normal((POSITIONS, FEATURES))
    with_outlier = [np.concatenate([np.full_like(z[:1], k), z[1:]]) for k in DISTANCES]
    panels = (
        (MEANS, [mean + z for mean in MEANS], "mean of the data, in deviations"),
        (DISTANCES, with_outlier, "distance of the first example, in deviations"),
    )
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, (abscissas, data, label) in zip(both, panels, strict=True):
        data = [x.astype(np.float32) for x in data]
        exact = [np.var(x.astype(np.float64), axis=0) for x in data]
        for name, (color, form) in FORMS.items():
            f = jax.jit(form)
            errors = [
                np.max(np.abs(f(x) / v - 1)) for x, v in zip(data, exact, strict=True)
            ]
            axes.plot(abscissas, errors, "o-", color=color, label=name, markersize=4)
            print(f"{name:20}", " ".join(f"{error:.0e}" for error in errors))
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    both[0].text(MEANS[0], 1.5, "no digit is right", fontsize=9)
    both[0].set_ylabel("largest relative error of the variance")
    both[1].legend()
    figure.savefig(HERE / "variance.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw_variance()
