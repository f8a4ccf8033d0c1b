"""Worker processes, signals and forks, each in a program of its own."""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SETUP = """
import itertools, json, os, sys, time
import numpy as np
from keras_cluster_mask.data import image_text_dataset


def tokenizer(captions):
    return [[len(caption)] for caption in captions]


def failing(image, generator):
    if image[0, 0, 0] == 5:
        raise MemoryError("too little")
    return image


def mixed(image, generator):
    return image + generator.integers(0, 50, dtype="uint8")


def make(source, training=True, **options):
    arguments = {"batch_size": 8, "seed": 3, "format": "grain", "include_keys": True}
    arguments.update(include_captions=True, background="random")
    arguments.update(options)
    return image_text_dataset(source, tokenizer, 16, training=training, **arguments)


def take(dataset, count=None):
    iterator = iter(dataset)
    batches = [*itertools.islice(iterator, count)]
    if hasattr(iterator, "close"):
        iterator.close()
    return batches
"""


@pytest.fixture
def start(tmp_path, write_pairs):
    """Starts a program, whose `source` are two shards of 60 samples."""
    write_pairs("a.tar", 0, 40)
    write_pairs("b.tar", 40, 20)
    started = []

    def start(code):
        body = textwrap.indent(textwrap.dedent(code), "    ")
        source = 'source = "[ab].tar"'
        program = f'{SETUP}\nif __name__ == "__main__":\n    {source}\n{body}'
        (tmp_path / "program.py").write_text(program)
        path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that starts the tests in the background has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run(start):
    """Runs a program, and returns what it prints."""

    def run(code):
        process = start(code)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        return out

    return run


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


# === The same batches ===


@pytest.mark.parametrize("training", [True, False])
def test_batches_do_not_depend_on_the_number_of_workers(run, training):
    out = run(
        f"""
        expected = None
        for workers, start in ((0, 0), (1, 0), (2, 0), (2, 5)):
            options = dict(image_transform=mixed, num_workers=workers)
            dataset = make(source, {training}, **options)
            dataset.start = start
            batches = take(dataset, 23 - start if {training} else None)
            assert len(batches) == (23 if {training} else 8) - start
            expected = expected or batches
            for one, other in zip(batches, expected[start:], strict=True):
                assert one.keys() == other.keys()
                for name in one:
                    assert one[name].dtype == other[name].dtype
                    np.testing.assert_array_equal(one[name], other[name])
            print("same")
        """
    )
    assert out.split() == ["same"] * 4


def test_workers_of_several_processes_read_each_sample_once_per_epoch(run):
    out = run(
        """
        parts = []
        for process in ((0, 2), (1, 2)):
            options = dict(batch_size=48, block_size=4, process=process)
            part = take(make(source, num_workers=2, **options), 2)
            # Another program resumes with another number of workers.
            dataset = make(source, num_workers=1, **options)
            dataset.start = 2
            part += take(dataset, 2)
            parts.append([[key.decode() for key in b["keys"]] for b in part])
        print(json.dumps(parts))
        """
    )
    parts = json.loads(out)
    assert [len(part) for part in parts] == [4, 4]
    stream = [key for batch in zip(*parts) for keys in batch for key in keys]
    assert len(stream) == 4 * 48
    for epoch in range(3):
        keys = stream[60 * epoch : 60 * epoch + 60]
        assert sorted(keys) == [f"{index:04}" for index in range(60)]


def test_workers_feed_a_tensorflow_dataset(run):
    pytest.importorskip("tensorflow")
    out = run(
        """
        expected = take(make(source), 20)
        dataset = make(source, format="tf", num_workers=2)
        for start in (0, 7):
            dataset.stream.start = start
            batches = list(dataset.take(20 - start))
            for one, other in zip(batches, expected[start:], strict=True):
                for name in one:
                    np.testing.assert_array_equal(one[name].numpy(), other[name])
            print("same")
        """
    )
    assert out.split() == ["same"] * 2


def test_an_object_is_read_by_workers(run):
    out = run(
        """
        from PIL import Image
        rows = [
            {"image": Image.new("RGB", (20, 24), (i,) * 3), "text": f"no {i}"}
            for i in range(20)
        ]
        dataset = make(rows, False, num_workers=2)
        print([int(key) for batch in take(dataset) for key in batch["keys"]])
        """
    )
    assert json.loads(out) == [*range(20)]


# === Errors ===


def test_too_little_memory_in_a_worker_ends_the_run_with_shard_and_key(run):
    out = run(
        """
        dataset = make(source, image_transform=failing, num_workers=2)
        try:
            take(dataset, 8)
        except Exception as error:
            print(error)
        """
    )
    for part in ("'0005'", "a.tar", "MemoryError", "too little"):
        assert part in out


def test_broken_samples_are_counted_across_workers(run, write_tar, noise, tmp_path):
    members = []
    for index in range(40):
        image = b"broken" if index % 10 == 3 else noise(index)
        members += [(f"{index}.png", image), (f"{index}.txt", b"t")]
    write_tar("c.tar", members)
    out = run(
        """
        import warnings
        warnings.simplefilter("ignore")
        for workers in (0, 2):
            dataset = make("c.tar", num_workers=workers)
            take(dataset, 5)
            print(dataset.skipped.by_reason)
        """
    )
    assert out.splitlines() == ["{'the image does not decode': 4}"] * 2


# === Signals ===


@pytest.mark.parametrize(
    ("workers", "training"), [(0, True), (1, True), (0, False), (2, False)]
)
def test_control_c_ends_the_program(start, tmp_path, workers, training):
    process = start(
        f"""
        iterator = iter(make(source, {training}, num_workers={workers}))
        next(iterator)
        open("ready", "w").close()
        for batch in iterator:
            time.sleep(1)
        """
    )
    wait_for(lambda: (tmp_path / "ready").exists() or process.poll() is not None, 60)
    assert process.poll() is None, process.communicate()[1]
    # The terminal sends it to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    wait_for(lambda: not members_of(process.pid), 5)


def test_control_c_of_one_process_alone_ends_its_workers(start, tmp_path):
    process = start(
        """
        dataset = make(source, num_workers=2)
        iterator = iter(dataset)
        next(iterator)
        open("ready", "w").close()
        try:
            for batch in iterator:
                time.sleep(0.01)
        except KeyboardInterrupt:
            print("stopped")
        """
    )
    wait_for((tmp_path / "ready").exists, 60)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out.split() == ["stopped"]
    wait_for(lambda: not members_of(process.pid), 5)


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


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="Linux")
def test_nothing_remains_after_a_program_was_killed(start, tmp_path):
    before = {*os.listdir("/dev/shm")}
    process = start(
        """
        # Arrays that are large enough to be shared.
        dataset = make(source, num_workers=2, batch_size=32)
        iterator = iter(dataset)
        for number in range(5):
            next(iterator)
        open("ready", "w").close()
        time.sleep(100)
        """
    )
    wait_for(lambda: (tmp_path / "ready").exists() or process.poll() is not None, 60)
    assert process.poll() is None, process.communicate()[1]
    assert len(members_of(process.pid)) >= 3
    made = {*os.listdir("/dev/shm")} - before
    assert made
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not members_of(process.pid), 15)
    # Other programs may share memory at the same time, but not for long.
    wait_for(lambda: not {*os.listdir("/dev/shm")} & made, 60)


def test_a_program_that_ends_in_mid_pass_leaves_no_process(start, tmp_path):
    process = start(
        """
        iterator = iter(make(source, num_workers=2))
        next(iterator)
        print("end")
        """
    )
    out, err = process.communicate(timeout=60)
    assert (out.split(), process.returncode) == (["end"], 0), err
    assert "Traceback" not in err
    wait_for(lambda: not members_of(process.pid), 5)


# === Forks ===
