import json

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.preparation import report


@pytest.fixture
def source(write_tar, encode, noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    captions = json.dumps({"captions": ["a red square", "a square"]}).encode()
    files = [
        ("1.png", encode(Image.new("RGBA", (30, 20)))),
        ("1.txt", b"a red square"),
        ("1.json", captions),
        # Upright it is 20 pixels wide and 40 high.
        ("2.jpg", encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)),
        ("2.txt", b"word " * 100),
        ("3.png", encode(Image.new("RGB", (50, 60)))),
        ("3.txt", b"a square"),
        ("4.png", noise(1)[:200]),
        ("4.txt", b"cut"),
        ("5.txt", b"no picture"),
    ]
    return write_tar("a.tar", files)


def test_sizes_kinds_and_captions_are_described(source):
    found = report(source)
    assert found["samples"] == 3
    pictures, captions = found["pictures"], found["captions"]
    assert {name: pictures["width"][name] for name in ("min", "50%", "max")} == {
        "min": 20,
        "50%": 30,
        "max": 50,
    }
    assert pictures["height"]["50%"] == 40
    assert pictures["pixels"]["max"] == 3000
    assert pictures["aspect"]["min"] == 0.5
    assert pictures["aspect"]["max"] == 1.5
    assert pictures["formats"] == {"PNG": 2, "JPEG": 1}
    assert pictures["modes"] == {"RGB": 2, "RGBA": 1}
    assert captions["count"] == 4
    assert captions["distinct"] == 3
    assert captions["repeated"] == 0.5
    assert captions["most_frequent"] == [{"caption": "a square", "count": 2}]
    assert captions["words"]["min"] == 2
    assert captions["words"]["max"] == 100
    assert captions["characters"]["max"] == 499
    assert captions["tokens"] is captions["over_77_tokens"] is None
    assert found["by_reason"] == {"no image": 1, "the image does not decode": 1}


def test_tokens_are_those_of_clip(source):
    pytest.importorskip("open_clip")
    captions = report(source, tokens=True)["captions"]
    # With the marks of start and end.
    assert captions["tokens"]["min"] == 4
    assert captions["tokens"]["max"] == 102
    assert captions["over_77_tokens"] == 0.25


@pytest.mark.parametrize("tokens", [False, True])
def test_a_figure_and_json_are_written(source, tmp_path, tokens):
    if tokens:
        pytest.importorskip("open_clip")
    found = report(source, tmp_path / "out", tokens=tokens)
    assert json.loads((tmp_path / "out/report.json").read_text()) == found
    figure = np.asarray(Image.open(tmp_path / "out/report.png").convert("L"))
    # Each of six panels has something to show.
    panels = [
        half for row in np.array_split(figure, 2) for half in np.array_split(row, 3, 1)
    ]
    assert all(panel.std() > 10 for panel in panels)


def test_data_without_a_whole_sample_is_described_too(write_tar, tmp_path):
    found = report(write_tar("a.tar", [("1.txt", b"text")]), tmp_path / "out")
    assert found["samples"] == 0
    assert found["pictures"]["width"] is None
    assert found["captions"]["repeated"] is None
    assert found["broken"] == 1
    assert (tmp_path / "out/report.png").stat().st_size > 1000
