import json
import os
import pathlib
import subprocess
import sys

import pytest

from keras_cluster_mask.data.__main__ import main

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def all_progress(monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.data.parts.SHORT", 0)


@pytest.fixture
def shard(write_pairs):
    return str(write_pairs("a.tar", 0, 12))


@pytest.fixture
def broken(write_pairs, noise):
    cut = [("cut\x1b.png", noise(0)[:200]), ("cut\x1b.txt", b"truncated")]
    return str(write_pairs("b.tar", 20, 3, cut))


def test_check_fails_if_a_sample_is_broken(shard, broken, tmp_path, capsys):
    assert main(["check", shard]) == 0
    assert "12  intact samples" in capsys.readouterr().out
    listed = tmp_path / "broken.json"
    assert main(["check", shard, broken]) == 0
    capsys.readouterr()
    arguments = ["check", shard, broken, "--decode", "--json", str(listed)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "1  the image does not decode" in printed.out
    # Control characters of a key do not reach the terminal.
    assert rf"{broken} cut\x1b the image does not decode" in printed.out
    assert "16/16" in printed.err
    (found,) = json.loads(listed.read_text())["first_broken"]
    assert (found["shard"], found["key"]) == (broken, "cut\x1b")


def test_check_shows_its_progress_and_continues(shard, broken, tmp_path, capsys):
    arguments = ["check", shard, broken, "--index", str(tmp_path / "index")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "16  intact samples" in printed.out
    assert "2/2" in printed.err
    assert len(list((tmp_path / "index").iterdir())) == 2
    # All is indexed already.
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "16  intact samples" in printed.out
    assert printed.err == ""


def test_convert_writes_shards_and_reports_broken_samples(
    shard, broken, tmp_path, capsys
):
    to = f"{tmp_path}/out-{{0}}.tar"
    arguments = ["convert", shard, broken, "--to", to, "--samples-per-shard", "9"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    names = f"{tmp_path}/out-0.tar to {tmp_path}/out-1.tar"
    assert f"15  samples written: {names}" in printed.out
    assert "1  broken samples" in printed.out
    assert "convert: 100%" in printed.err
    assert "16/16" in printed.err
    assert main(["check", to.replace("{0}", "*")]) == 0
    assert main(arguments) == 2
    arguments[4] = f"{tmp_path}/small-{{0}}.tar"
    assert main([*arguments, "--image-size", "8"]) == 0


def test_convert_fails_if_no_sample_is_intact(broken, tmp_path, capsys):
    to = f"{tmp_path}/out.tar"
    assert main(["convert", broken, "--caption-key", "alt", "--to", to]) == 1
    assert "0  samples written: no file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["guess"],
        ["check"],
        ["check", "missing.tar"],
        ["convert", "{shard}"],
        ["convert", "{shard}", "--to", "out.zip"],
        ["convert", "{shard}", "--to", "out.tar", "--image-size", "-1"],
        ["convert", "{shard}", "--to", "out.tar", "--image-size", "large"],
    ],
)
def test_errors_have_status_two_and_no_traceback(
    arguments, shard, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main(["check", shard])
    capsys.readouterr()
    try:
        status = main([each.replace("{shard}", shard) for each in arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_it_is_a_program_that_starts_others(shard, broken):
    arguments = ["check", shard, broken, "missing.tar", "--workers", "2"]
    module = [sys.executable, "-m", "keras_cluster_mask.data"]
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 300}
    options.update(capture_output=True, text=True)
    done = subprocess.run([*module, *arguments], **options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.endswith("Received (missing): missing.tar")
    arguments.remove("missing.tar")
    done = subprocess.run([*module, *arguments], **options)
    assert done.returncode == 0, done.stderr
    assert "16  intact samples" in done.stdout


@pytest.mark.slow
def test_a_command_prints_its_result_and_nothing_else(shard, tmp_path):
    # As a user starts it: in a folder of theirs, with no setting for logs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    environment |= {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "keras_cluster_mask.data"]
        + ["check", shard],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0
    assert "12  intact samples" in done.stdout
    lines = done.stderr.splitlines()
    imported = {x.rpartition("|")[2].strip() for x in lines if x.startswith("import ")}
    # Nor does it wait for packages that it does not need. grain imports JAX.
    assert "keras_cluster_mask.data.check" in imported
    assert not imported & {"keras", "keras_hub", "tensorflow", "torch"}
    others = [x for x in lines if not x.startswith("import time:")]
    assert all("index:" in x for x in others if x.strip()), others
