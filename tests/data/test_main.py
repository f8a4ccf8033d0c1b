import json
import os
import pathlib
import subprocess
import sys

import pytest

from keras_cluster_mask.data.__main__ import main

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def shard(write_pairs):
    return str(write_pairs("a.tar", 0, 12))


@pytest.fixture
def broken(write_pairs, noise):
    cut = [("cut\x1b.png", noise(0)[:200]), ("cut\x1b.txt", b"truncated")]
    return str(write_pairs("b.tar", 20, 3, cut))


def test_check_counts_samples_and_fails_if_one_is_broken(
    shard, broken, tmp_path, capsys
):
    index = tmp_path / "index"
    arguments = ["check", shard, broken, "--index", str(index)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 16
    assert len(list(index.iterdir())) == 2
    assert main([*arguments, "--decode"]) == 1
    printed = capsys.readouterr().out
    # Control characters of a key do not reach the terminal.
    assert "\x1b" not in printed
    ((reason, (found,)),) = json.loads(printed)["examples"].items()
    assert (found["shard"], found["key"]) == (broken, "cut\x1b")
    assert found["reason"] == reason == "the image does not decode"


def test_fields_are_named(write_tar, noise):
    shard = write_tar("a.tar", [("1.seg.png", noise(1)), ("1.alt", b"text")])
    names = ["--image-key", "seg.png", "--caption-key", "x", "--caption-key", "alt"]
    assert main(["check", str(shard)]) == 1
    assert main(["check", str(shard), *names]) == 0
    assert main(["check", str(shard), "--label-key", "missing", *names]) == 1
    labeled = ["check", str(shard), "--label-key", "alt", "--decode", *names[:2]]
    assert main(labeled) == 1
    assert main([*labeled, "--class-name", "x", "--class-name", "text"]) == 0


def test_errors_have_status_two(capsys):
    with pytest.raises(SystemExit) as error:
        main(["check", "missing.tar"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.slow
def test_the_program_starts_workers_and_prints_its_result(shard, broken, tmp_path):
    # As a user starts it: in a folder of theirs, with no setting for logs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    environment |= {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "keras_cluster_mask.data"]
        + ["check", shard, broken, "--workers", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["samples"] == 16
    lines = done.stderr.splitlines()
    imported = {x.rpartition("|")[2].strip() for x in lines if x.startswith("import ")}
    # It does not wait for packages that it does not need.
    assert "keras_cluster_mask.data.check" in imported
    assert not imported & {"keras", "keras_hub", "tensorflow", "torch", "jax"}
    others = [x for x in lines if not x.startswith("import time:")]
    assert all("index:" in x for x in others if x.strip()), others
