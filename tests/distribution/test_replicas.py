"""Two devices train as one does: the same loss, the same masks, the same weights."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from tests.helpers import MASKINGS, assert_close

pytestmark = pytest.mark.slow

BACKEND = keras.backend.backend()
PROGRAM = pathlib.Path(__file__).with_name("program.py")
KINDS = {
    "jax": ["devices", "process"],
    "tensorflow": ["devices"],
    "torch": ["process"],
}[BACKEND]
# Processes of JAX train as devices of one do, and do more.
MOST = KINDS[-1:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(out, how, rank=0, port=None, **environment):
    if how == "process":
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
            "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
            "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
        }
    return subprocess.Popen(
        [sys.executable, PROGRAM, out, how],
        env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out, how, **environment):
    """Runs to the end, in as many processes as it takes; returns how each ended."""
    ranks = (0, 1) if how == "process" else (0,)
    port = free_port()
    processes = [start(out, how, rank=rank, port=port, **environment) for rank in ranks]
    try:
        # Ends a program that hangs, not one on a busy machine.
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text[-3000:]) for p, text in zip(processes, errors)]


def train(out, how):
    """Trains to the end; returns what the program wrote."""
    for code, errors in run(out, how):
        assert code == 0, errors
    with np.load(out) as arrays:
        return dict(arrays)


def assert_equal_runs(found, single):
    # Devices add in another order: a sum of float32 differs by a few units in its last
    # place, which of a large one (the norm of all gradients, 62) is more than 1e-5.
    assert_close(found, single, atol=1e-5, rtol=2e-6)
    if BACKEND == "torch":
        # No weight is large.
        names = [name for name in found if "weights/" in name]
        assert_close(*({k: x[k] for k in names} for x in (found, single)), atol=1e-6)


def assert_all_equal(found, single):
    """Compares models trained in each way with the same model on a single device."""
    ways = {tuple(name.split("/")[:2]) for name in found}
    assert len(ways) >= 4
    for duplicates, way in ways:
        one = way.replace("micro", "whole")
        assert_equal_runs(
            part_of(found, f"{duplicates}/{way}/"),
            part_of(single, f"{duplicates}/{one}/"),
        )


def part_of(arrays, prefix):
    part = {
        k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)
    }
    assert np.isfinite(part["history/loss"]).all()
    return part


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single") / "out.npz", "single")


@pytest.mark.parametrize("how", KINDS)
def test_two_train_and_evaluate_as_one(single, how, tmp_path):
    # With a threshold that moves, gradients that are clipped, equal captions on both;
    # retrieval of all pairs after an epoch. With micro-batches and whole batches, equal
    # captions as positives and as negatives; on torch whatever has gradients.
    assert (
        len([x for x in single if x.startswith("positive/whole") and "recall" in x])
        == 6
    )
    assert_all_equal(train(tmp_path / "out.npz", how), single)


@pytest.mark.skipif(BACKEND != "torch", reason="Others see one model.")
def test_processes_that_train_different_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZE", "1")
    for code, errors in run(tmp_path / "out.npz", "process"):
        assert code != 0
        assert "must train the same weights" in errors
        assert "Received: numbers of trainable weights [" in errors


@pytest.mark.parametrize("how", MOST)
def test_two_train_as_one_with_every_masking(how, tmp_path, monkeypatch):
    # A masking does not depend on `duplicates`, whose values take turns.
    monkeypatch.setenv("MASKING", "all")
    single = train(tmp_path / "single.npz", "single")
    assert {name.split("/")[0] for name in single} == {*MASKINGS}
    assert_equal_runs(train(tmp_path / "out.npz", how), single)


@pytest.mark.parametrize("how", MOST)
def test_a_run_on_shards_that_was_cut_off_ends_as_one_device_does(
    how, write_tar, encode, tmp_path, monkeypatch
):
    pytest.importorskip("tensorflow")
    # Noise, not plain images: those have nearly equal embeddings, among which rounding
    # decides which is the most similar, and with it the accuracy.
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 24, 3), "uint8")
    files = []
    for i, image in enumerate(images):
        files += [(f"{i:04}.png", encode(image)), (f"{i:04}.txt", b"no %d" % i)]
    write_tar("a.tar", files[: 2 * 27])
    write_tar("b.tar", files[2 * 27 :])
    # A ragged end, where the processes of JAX do not each need as many rows.
    rows = 16 if (BACKEND, how) == ("jax", "process") else 19
    held_out = write_tar("held_out.tar", files[: 2 * rows])
    monkeypatch.setenv("HELD_OUT", str(held_out))
    monkeypatch.setenv("SHARDS", str(tmp_path / "?.tar"))
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "single"))
    single = train(tmp_path / "single.npz", "single")
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "cut"))
    # Within the second of two epochs of five steps. With one value of `duplicates`,
    # since no caption occurs twice.
    run(tmp_path / "none.npz", how, DIE_AT="8")
    found = train(tmp_path / "out.npz", how)
    assert_equal_runs(found, single)


@pytest.mark.parametrize("how", KINDS)
def test_a_loss_that_is_not_finite_stops_all_processes(how, tmp_path):
    folder = tmp_path / "run"
    environment = {"BAD_STEP": "3", "CHECKPOINT": str(folder)}
    for code, errors in run(tmp_path / "out.npz", how, **environment):
        assert code != 0
        assert "Received: loss=nan in epoch 1" in errors
    assert not folder.exists()


# Keras shares models on JAX alone: two halves of the batch, each on two devices with
# half of the model; Adam's moments lie as the weights do.
@pytest.mark.parametrize("how", [*MOST, *["model"] * (BACKEND == "jax")])
def test_devices_whose_texts_have_other_lengths_train_as_one(
    how, tmp_path, monkeypatch
):
    monkeypatch.setenv("CLIP", "1")
    single = train(tmp_path / "single.npz", "single")
    assert_all_equal(train(tmp_path / "out.npz", how), single)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="One process has all the devices.")
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path):
    port = free_port()
    out = tmp_path / "out.npz"
    survivor = start(out, "process", rank=0, port=port)
    dying = start(out, "process", rank=1, port=port, DIE_AT="2")
    try:
        dying.communicate(timeout=300)
        assert dying.returncode == 7
        begin = time.monotonic()
        _, errors = survivor.communicate(timeout=120)
        assert time.monotonic() - begin < 60
    finally:
        survivor.kill()
    assert survivor.returncode != 0
    assert not out.exists()
    assert any(word in errors.lower() for word in ("peer", "connection", "gloo"))
