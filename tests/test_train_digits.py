"""The main job: `notebooks/train_digits.py`."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en


for module in ("matplotlib", "optax", "sklearn", "tqdm"):
    pytest.importorskip(module)

SCRIPT = Path(__file__).parents[1] / "notebooks" / "train_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_is_split_without_overlap(script):
    data, test = script.load_data()
    train_set = {image.tobytes() for image in np.asarray(data.images)}
    test_set = {image.tobytes() for image in np.asarray(test.images)}
    assert len(data.labels) == script.TRAIN_SIZE
    assert len(test.labels) == 1797 - script.TRAIN_SIZE
    assert not train_set & test_set


class Terminal(io.StringIO):
    def isatty(self):
        return True


# A process of its own, where there are as many devices as are asked for; with fewer layers.
CHANNELS = (1, 16, 32, 32)
MAIN = f"""
import sys, train_digits
train_digits.CHANNELS = {CHANNELS}
sys.exit(train_digits.main(sys.argv[1:]))
"""


def test_four_devices_give_the_loss_of_one(script, tmp_path, monkeypatch):
    picture = tmp_path / "curves.png"
    options = ["--devices=4", "--epochs=1", "--norm=batch", f"--output={picture}"]
    run = subprocess.run(
        [sys.executable, "-c", MAIN, *options],
        capture_output=True,
        cwd=SCRIPT.parent,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    (line,) = run.stderr.splitlines()  # off a terminal, no progress bar
    assert line.startswith("        batch: loss ")
    assert picture.read_bytes().startswith(b"\x89PNG")
    _, row, last = run.stdout.splitlines()
    assert str(picture) in last
    norm, accuracy, _, first_epoch_loss, *_ = row.split()
    assert norm == "batch"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(script, "CHANNELS", CHANNELS)
    with jax.numpy_dtype_promotion("standard"):  # Optax is not strict
        one = script.train("batch", *script.load_data(), devices=1, epochs=1, seed=0)
    assert "12/12" in terminal.getvalue()
    # Running statistics of use from the first epoch on.
    assert float(accuracy.rstrip("%")) > 50
    assert float(first_epoch_loss) == pytest.approx(one.loss[0].mean(), abs=1e-3)
    assert one.loss[0, -1] < one.loss[0, 0] - 0.5
    for stats in one.running:
        assert (np.asarray(stats.count) == 12).all()


@pytest.mark.parametrize("running", [True, False])
def test_plot(script, tmp_path, running):
    history = script.History(np.ones((2, 3)), np.array([0.5, np.nan]), [], 1.0)
    if running:
        stats = en.RunningStats(jnp.zeros(3), jnp.ones(3), jnp.ones(3, jnp.int32))
        histories = {"none": history, "batch": history._replace(running=[stats, stats])}
    else:
        histories = {"none": history, "rms": history}
    script.plot(histories, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_an_older_picture_is_kept(script, tmp_path):
    for name in ("a.png", "a-2.png", "a-3.png"):
        path = script.unused(tmp_path / "a.png")
        assert path == tmp_path / name
        path.touch()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--norm=group", "--norm: invalid choice: 'group'"),
        ("--epochs=0", "--epochs: must be a whole number, at least 1, got 0"),
        ("--epochs=two", "--epochs: must be a whole number, at least 1, got two"),
        ("--seed=-1", "--seed: must be a whole number, at least 0, got -1"),
        ("--devices=0", "--devices: must be a whole number, at least 1, got 0"),
        ("--devices=7", "--devices: must divide the batch of 120, got 7"),
        ("--output=a.jpg", "--output: must end in .png, got a.jpg"),
        ("--output=nowhere/a.png", "--output: cannot write to the folder nowhere"),
        ("--layer=batch", "unrecognized arguments: --layer=batch"),
    ],
)
def test_a_bad_option_is_a_usage_error(script, capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        script.main([option])
    error = capsys.readouterr().err
    assert error.startswith("usage:")
    assert message in error


def test_help_waits_for_no_import():
    command = [sys.executable, "-X", "importtime", SCRIPT, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--devices DEVICES" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"eqx_norms", "jax", "matplotlib", "numpy", "optax", "sklearn"}


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_ctrl_c(script, capsys, monkeypatch, tmp_path, finished):
    """What is finished is kept: the table and the picture have it."""
    # Raised here, and not by a signal: one that arrives while JAX's callback for garbage
    # collection runs is lost (jax issue 18246).
    names = list(script.NORMS)[:finished]

    def train(norm, *args, **kwargs):
        if norm not in names:
            raise KeyboardInterrupt
        return script.History(np.ones((2, 3)), np.array([0.25, 0.5]), [], 1.0)

    monkeypatch.setattr(script, "train", train)
    picture = tmp_path / "curves.png"
    assert script.main([f"--output={picture}"]) == 130
    printed = capsys.readouterr()
    message = f"Interrupted: {finished} of 5 networks were trained."
    assert printed.err.strip() == message
    assert [line.split()[0] for line in printed.out.splitlines()[1:-1]] == names
    assert picture.exists() == (str(picture) in printed.out) == (finished > 0)
