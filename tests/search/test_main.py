import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from keras_cluster_mask.search.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(model, tokenizer, folder, tmp_path_factory):
    """A folder with a model, its tokenizer and an index."""
    place = tmp_path_factory.mktemp("saved")
    model.save(place / "model.keras")
    tokenizer.save(place / "tokenizer.json")
    to = str(place / "index.npz")
    assert (
        main(["index", f"{place}/model.keras", str(folder), "--to", to, "--quiet"]) == 0
    )
    return place


def query(saved, *arguments):
    model = ["--model", f"{saved}/model.keras"]
    return main(["query", *model, f"{saved}/index.npz", *arguments])


def test_words_and_pictures_find_pictures(saved, folder, capsys):
    picture = str(folder / "2024" / "4.png")
    words = ["a red square", "собака", "--tokenizer", f"{saved}/tokenizer.json"]
    sheet = saved / "results.png"
    assert (
        query(saved, *words, "--image", picture, "-k", "3", "--sheet", str(sheet)) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a red square"
    assert (lines[4], lines[8]) == ("собака", picture)
    assert lines[9].split(maxsplit=1) == ["1.000", picture]
    assert lines[-1].split() == ["3", "queries", "shown:", str(sheet)]
    assert Image.open(sheet).width == 12 + 4 * 188


def test_what_could_not_be_read_is_told(saved, png, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png()[:40])
    to = ["--to", str(tmp_path / "a.npz"), "--quiet", "--float16"]
    with pytest.warns(UserWarning, match="does not decode"):
        assert main(["index", f"{saved}/model.keras", str(tmp_path), *to]) == 0
    printed = capsys.readouterr().out
    assert "1  pictures indexed" in printed
    assert "1  could not be read" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT or an --image"),
        (["a dog"], "needs the --tokenizer"),
        (["a", "--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", "x.png", "--sheet", "x.jpg"], "must end in .png"),
    ],
)
def test_errors_are_one_line(saved, arguments, message, capsys):
    assert query(saved, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m keras_cluster_mask.search query: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_module_is_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "keras_cluster_mask.search", "query", "x.npz", "a"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--model" in done.stderr
