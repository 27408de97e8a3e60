"""Several processes, each with devices of its own, train as one does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from .distributed_worker import train


ROOT = Path(__file__).parents[1]
NUMBER = 2
SECONDS = 120


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def outcomes(folder):
    """Starts the workers and waits; what they saved, or what they printed when they fail.

    All of them are gone afterwards.
    """
    address = free_address()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # The devices are the worker's to choose.
    environment.pop("XLA_FLAGS", None)
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    logs = [folder / f"{i}.log" for i in range(NUMBER)]
    results = [folder / f"{i}.npz" for i in range(NUMBER)]
    workers = []
    try:
        for i in range(NUMBER):
            where = address, str(NUMBER), str(i)
            with logs[i].open("w") as log:
                workers.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "tests.distributed_worker",
                            results[i],
                            *where,
                        ],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + SECONDS
        # If one fails the others would wait for it.
        while any(w.poll() is None for w in workers):
            if any(w.poll() for w in workers) or time.monotonic() > end:
                break
            time.sleep(0.1)
        codes = [w.poll() for w in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    if any(codes) or None in codes:
        printed = "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)
        pytest.fail(f"exit codes {codes} (None: killed after {SECONDS} s)\n{printed}")
    saved = []
    for result in results:
        with np.load(result) as arrays:
            saved.append([arrays[name] for name in arrays.files])
    return saved


def test_two_processes_train_as_one(tmp_path):
    first, second = outcomes(tmp_path)
    alone = train(None)
    assert len(first) == len(alone)
    for one, two, other in zip(first, second, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
