import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from keras_cluster_mask.data.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def shard(write_pairs):
    return str(write_pairs("a.tar", 0, 12))


@pytest.fixture
def broken(write_pairs, noise):
    cut = [("cut.png", noise(0)[:200]), ("cut.txt", b"cut")]
    return str(write_pairs("b.tar", 20, 3, cut))


def test_check_says_by_its_status_whether_all_is_whole(shard, broken, tmp_path, capsys):
    assert main(["check", shard]) == 0
    assert "12  whole samples" in capsys.readouterr().out
    listed = tmp_path / "broken.json"
    assert main(["check", shard, broken, "--json", str(listed)]) == 1
    printed = capsys.readouterr()
    assert "1  the image does not decode" in printed.out
    assert f"{broken}  cut  the image does not decode" in printed.out
    assert "check: shard 2 of 2, 16 samples" in printed.err
    (found,) = json.loads(listed.read_text())["all_broken"]
    assert (found["shard"], found["key"]) == (broken, "cut")


def test_quiet_commands_say_nothing_on_stderr(shard, capsys):
    assert main(["count", shard, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1].split() == ["12", "12", "0", "in", "all"]


def test_every_command_runs(shard, broken, tmp_path, capsys):
    to = f"{tmp_path}/out-{{0}}.tar"
    assert main(["convert", shard, broken, "--to", to, "--samples-per-shard", "9"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"15  samples written: {tmp_path}/out-0.tar to {tmp_path}/out-1.tar" in printed
    )
    assert "1  broken, left out" in printed
    groups = tmp_path / "groups.json"
    assert main(["deduplicate", shard, shard.replace("a.", "?."), "--near",
                 "--dry-run", "--json", str(groups)]) == 0  # fmt: skip
    assert json.loads(groups.read_text())["kept"] == 15
    assert main(["report", shard, "--to", f"{tmp_path}/report"]) == 0
    assert "caption, words" in capsys.readouterr().out
    sheet = f"{tmp_path}/sheet.png"
    assert main(["contact-sheet", shard, "--to", sheet, "--seed", "1"]) == 0
    assert Image.open(sheet).size[0] > 1000


def test_nothing_to_write_is_no_success(broken, tmp_path):
    to = f"{tmp_path}/out.tar"
    assert main(["convert", broken, "--caption-key", "alt", "--to", to]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["guess"],
        ["check"],
        ["check", "missing.tar"],
        ["convert", "{shard}", "--to", "out.zip"],
        ["convert", "{shard}", "--to", "out.tar", "--image-size", "-1"],
        ["deduplicate", "{shard}"],
        ["deduplicate", "{shard}", "--dry-run", "--distance", "40"],
        ["contact-sheet", "{shard}", "--to", "sheet.gif"],
        ["report", "{shard}", "--resume", "{shard}"],
    ],
)
def test_errors_are_one_line_and_status_two(
    arguments, shard, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [each.replace("{shard}", shard) for each in arguments]
    try:
        status = main([*arguments, "--quiet"] if arguments else [])
    except SystemExit as error:
        status = error.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("python -m keras_cluster_mask.data")


def test_it_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "keras_cluster_mask.data", "check", "missing.tar"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # TensorFlow may have said something before.
    assert done.stderr.splitlines()[-1].endswith("Received (missing): missing.tar")
