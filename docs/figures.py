"""Draws the picture of `how-it-works.md`: `python docs/figures.py`.

How far the output of a batch norm of float32 data is from that in float64 of the same data.
The curves of eqx_norms are those of its `BatchNorm`; the other two are what it does not do.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import eqx_norms as en


HERE = Path(__file__).parent
FEATURES, POSITIONS, EPSILON = 256, 4096, 1e-5
MEANS = 10.0 ** np.arange(0, 6.01, 0.5)
DISTANCES = 10.0 ** np.arange(0, 4.01, 0.5)
COLORS = {"about zero": "#8c564b", "one number": "#e377c2"}  # matplotlib's C5 and C6
COLORS |= {"a few entries": "#1f77b4", "all": "#9e9d24"}  # C0 and a darker C8


def about_zero(x):
    mean = jnp.mean(x, 0)
    var = jnp.maximum(jnp.mean(x * x, 0) - mean * mean, 0)
    return (x - mean) * lax.rsqrt(var + EPSILON)


def one_number(x):
    mean = jnp.mean(x, 0)
    return (x - mean) * lax.rsqrt(jnp.mean((x - mean) ** 2, 0) + EPSILON)


def batch_norm(use_fast_variance):
    norm, state = eqx.nn.make_with_state(en.BatchNorm)(
        FEATURES, epsilon=EPSILON, use_fast_variance=use_fast_variance
    )
    return lambda x: norm(x, state)[0]


def errors(form, data):
    """The largest error for each array; that of the outlier is left aside."""
    form = jax.jit(form)
    for x in data:
        x = x.astype(np.float32)
        wide = x.astype(np.float64)
        expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)
        yield np.abs(np.asarray(form(x)) - expected)[1:].max()


class Panel:
    """Of a picture in SVG: a plot with powers of ten along both axes."""

    WIDTH, HEIGHT, TOP, BOTTOM = 300, 250, 4, -8

    def __init__(self, left, decades, label):
        self.left, self.decades, self.lines = left, decades, []
        right, foot = left + self.WIDTH, 20 + self.HEIGHT
        for power in range(decades + 1):
            x = self.x(10.0**power)
            self.lines += [
                f'<path class="grid" d="M{x:.0f} 20V{foot}"/>',
                text(x, foot + 16, power),
            ]
        for power in range(self.BOTTOM, self.TOP + 1, 2):
            y = self.y(10.0**power)
            self.lines.append(f'<path class="grid" d="M{left} {y:.0f}H{right}"/>')
            if left < 100:
                self.lines.append(text(left - 18, y + 4, power))
        self.lines.append(
            f'<text x="{left + self.WIDTH / 2}" y="{foot + 38}">{label}</text>'
        )

    def x(self, value):
        return self.left + self.WIDTH * np.log10(value) / self.decades

    def y(self, value):
        height = self.HEIGHT / (self.TOP - self.BOTTOM)
        return 20 + height * (self.TOP - np.log10(value))

    def draw(self, xs, ys, name):
        points = " ".join(
            f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True)
        )
        self.lines.append(f'<polyline stroke="{COLORS[name]}" points="{points}"/>')

    def write(self, x, y, words, name):
        self.lines.append(
            f'<text class="name" fill="{COLORS[name]}" x="{x}" y="{y}">{words}</text>'
        )


def text(x, y, power):
    """Ten to a power."""
    raised = f'<tspan dy="-5" font-size="9">{power}</tspan>'
    return f'<text x="{x:.0f}" y="{y:.0f}">10{raised}</text>'


def draw():
    z = np.random.default_rng(0).standard_normal((POSITIONS, FEATURES))
    with_outlier = [np.concatenate([np.full_like(z[:1], k), z[1:]]) for k in DISTANCES]
    fast, exact = batch_norm(True), batch_norm(False)
    left = Panel(70, 6, "mean of the data, in deviations")
    right = Panel(400, 4, "distance of the first example, in deviations")
    for panel, xs, data, forms in (
        (
            left,
            MEANS,
            [mean + z for mean in MEANS],
            {
                "about zero": about_zero,
                "one number": one_number,
                "all": exact,
                "a few entries": fast,
            },
        ),
        (right, DISTANCES, with_outlier, {"all": exact, "a few entries": fast}),
    ):
        for name, form in forms.items():
            found = list(errors(form, data))
            print(f"{name:15}", " ".join(f"{error:.0e}" for error in found))
            panel.draw(xs, found, name)
    left.write(84, 130, "E[x²] &#8722; E[x]²", "about zero")
    left.write(225, 130, "the mean as one number", "one number")
    left.write(84, 258, "shift and offset", "a few entries")
    right.write(415, 165, "about a few entries", "a few entries")
    right.write(415, 243, "about the mean of all", "all")
    size = 'width="720" height="316"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 316" {size}>',
        "<style>text{font:13px sans-serif;text-anchor:middle}.name{text-anchor:start}",
        ".grid{stroke:#ddd}polyline{fill:none;stroke-width:2}</style>",
        f'<rect {size} fill="#fff"/>',
        '<text transform="translate(16 145) rotate(-90)">largest error of an output</text>',
        *left.lines,
        *right.lines,
        "</svg>",
    ]
    (HERE / "variance.svg").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    draw()
