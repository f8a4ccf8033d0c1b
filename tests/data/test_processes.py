"""Worker processes: they make the same batches, and end with the program."""

import contextlib
import functools
import glob
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.data.reading import (
    assert_same,
    keys,
    make_dataset,
    take,
)

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

PROGRAM = pathlib.Path(__file__).parent / "worker_program.py"
ROOT = PROGRAM.parents[2]


def failing(image, generator):
    if image[0, 0, 0] == 5:
        raise MemoryError("too little")
    return image


def ending(image, generator):
    os._exit(3)


def mixed(image, generator):
    return image + generator.integers(0, 50, dtype="uint8")


make = functools.partial(make_dataset, training=True, include_captions=True, seed=3)


@pytest.fixture
def source(write_pairs):
    """Two shards of 60 samples."""
    return [write_pairs("a.tar", 0, 40), write_pairs("b.tar", 40, 20)]


# === The same batches ===


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 23),
        ({"batch_size": 48, "block_size": 4, "process": (1, 2)}, 6),
        ({"training": False}, 8),
    ],
)
def test_batches_do_not_depend_on_the_number_of_workers(source, options, count):
    is_training = options.get("training", True)
    plain = {"image_transform": mixed if is_training else None}
    expected = take(make(source, **plain, **options), count)
    assert len(expected) == count
    for workers, start in ((1, 0), (2, 5)):
        transform = (lambda *arguments: mixed(*arguments)) if is_training else None
        changed = {"image_transform": transform, "num_workers": workers}
        dataset = make(source, **changed, **options)
        dataset.start = start
        batches = take(dataset, count - start if is_training else None)
        assert_same(batches, expected[start:])


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_workers_read_an_object_and_count_its_broken_samples():
    rows = [
        {"image": Image.new("RGB", (20, 24), (i,) * 3), "text": f"no {i}"}
        for i in range(40)
    ]
    for row in rows[3::10]:
        row["image"] = b"broken"
    dataset = make(rows, training=False, num_workers=2)
    assert keys(dataset) == [str(i) for i in range(40) if i % 10 != 3]
    assert dataset.skipped.by_reason == {"the image cannot be decoded": 4}


def shows_the_limit(image, generator):
    return np.full_like(image, Image.MAX_IMAGE_PIXELS // 10)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_workers_use_the_settings_with_which_the_dataset_was_made(
    write_pairs, noise, monkeypatch, data_format
):
    large = [("large.png", noise(0, (50, 50))), ("large.txt", b"large")]
    source = write_pairs("a.tar", 0, 15, large)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
        dataset = make(
            source, batch_size=16, image_transform=shows_the_limit, num_workers=1
        )
        (batch,) = take(dataset, 1)
    assert (batch["images"] == 200).all()
    is_first = data_format == "channels_first"
    assert batch["images"].shape[1:] == ((3, 16, 16) if is_first else (16, 16, 3))
    assert dataset.skipped.by_reason == {"the image has too many pixels": 1}


# === Errors ===


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (failing, r"'0005' of .*a\.tar.*MemoryError.*too little"),
        (ending, "`num_workers`.*exit code 3"),
    ],
)
def test_a_worker_that_fails_or_ends_is_an_error(source, transform, message):
    dataset = make(source, image_transform=transform, num_workers=1)
    with pytest.raises(RuntimeError, match=message):
        take(dataset, 8)


# === The end of a program ===


@pytest.fixture
def start(tmp_path, source):
    """Starts the program, and waits until it has the first batch."""
    started = []

    def start(*arguments, source="[ab].tar"):
        process = subprocess.Popen(
            [sys.executable, PROGRAM, source, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that starts the tests in the background has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        ready = tmp_path / "ready"
        wait_for(lambda: ready.exists() or process.poll() is not None, 200)
        assert ready.exists(), process.communicate()[1]
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def members_of(group):
    """The processes of a group."""
    found = []
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{folder}/stat") as file:
                # The name, in parentheses, may have spaces.
                state, _, number = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(folder)
    return found


# Only the program gets the signal, or all of its processes, as from a terminal.
@pytest.mark.parametrize(
    ("kill", "workers", "case"),
    [
        (os.killpg, 2, "reading"),
        (os.kill, 0, "stalled read"),
        (os.kill, 1, "stalled read"),
        (os.killpg, 1, "stalled read"),
        (os.kill, 2, "stopped worker"),
        (os.kill, 1, "stop"),
    ],
)
def test_control_c_ends_a_program_also_where_its_storage_stalls(
    start, tmp_path, kill, workers, case
):
    arguments = ["stop"] if case == "stop" else []
    process = start(workers, *arguments, source=f"stalling://{tmp_path}/[ab].tar")
    if case == "stopped worker":
        worker = max(int(os.path.basename(f)) for f in members_of(process.pid))
        os.kill(worker, signal.SIGSTOP)
    elif case == "stalled read":
        (tmp_path / "stall").touch()
        wait_for((tmp_path / "stalled").exists, 20)
    time.sleep(1)
    kill(process.pid, signal.SIGINT)
    # It takes less than 5 seconds, but more if other tests run at the same time.
    _, err = process.communicate(timeout=20)
    # Workers print nothing.
    assert err.count("Traceback") == err.count("KeyboardInterrupt\n") == 1
    wait_for(lambda: not members_of(process.pid), 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_remains_after_a_program_was_killed(start, number):
    before = {*glob.glob("/dev/shm/pym-*")}
    process = start(1)
    # One of them keeps track of what the others share.
    assert len(members_of(process.pid)) >= 3
    os.kill(process.pid, number)
    assert not process.communicate(timeout=20)[1]
    wait_for(lambda: not members_of(process.pid), 15)
    # Other programs may share memory at the same time, but not for long.
    wait_for(lambda: not {*glob.glob("/dev/shm/pym-*")} - before, 60)


def test_a_worker_imports_no_backend_and_ends_with_a_program_that_ends_in_mid_pass(
    start,
):
    """Imports would take seconds, and hundreds of megabytes in each worker."""
    process = start(1, "end")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.split() == ["imported:", "[0,", "0,", "0]"]
    wait_for(lambda: not members_of(process.pid), 5)
