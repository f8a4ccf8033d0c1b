import json

import pytest
from PIL import Image

from keras_cluster_mask.data import check, image_text_dataset, read_captions
from keras_cluster_mask.data.formats import indexed
from tests.data.reading import pairs_of

pytestmark = pytest.mark.any_backend


def test_a_folder_of_classes_needs_no_captions(tmp_path, noise):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(noise(0))
    (tmp_path / "none.png").write_bytes(noise(0))
    found = check(tmp_path, label_key="folder")
    assert (found["samples"], found["by_reason"]) == (2, {"no label": 1})
    assert check(tmp_path)["by_reason"] == {"no caption": 3}
    found = check(tmp_path, caption_key="txt", label_key="folder")
    assert found["by_reason"] == {"no caption": 3}


def test_broken_samples_are_listed_with_their_reasons(write_pairs, noise):
    photograph = noise(1, (200, 300), "JPEG")
    broken = [
        ("cut.jpg", photograph[: len(photograph) * 9 // 10]),
        ("cut.txt", b"truncated near its end"),
        ("png.png", noise(2)[:-40]),
        ("png.txt", b"truncated"),
        ("silent.png", noise(3)),
        ("blank.png", noise(3)),
        ("blank.txt", b" \n"),
    ]
    two = [("9.png", noise(0)), ("9.txt", b"one\ntwo")]
    shard = write_pairs("a.tar", 0, 4, broken)
    found = check([shard, write_pairs("b.tar", 5, 2, two)])
    assert json.loads(json.dumps(found)) == found
    assert [found[x] for x in ("samples", "captions", "broken")] == [7, 8, 4]
    listed = found["examples"]
    assert found["by_reason"] == {reason: len(x) for reason, x in listed.items()}
    assert {
        (x["file"], x["key"], reason) for reason in listed for x in listed[reason]
    } == {
        (str(shard), "blank", "empty caption"),
        (str(shard), "silent", "no caption"),
        (str(shard), "cut", "the image cannot be decoded"),
        (str(shard), "png", "the image cannot be decoded"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_that_only_evaluation_leaves_out_is_broken(
    write_tar, noise, monkeypatch
):
    shard = write_tar("a.tar", pairs_of([noise(0, (50, 50), "JPEG"), noise(0)]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert check(shard)["by_reason"] == {"the image has too many pixels": 1}


def test_the_bar_of_the_index_ends_with_all_shards(write_pairs, monkeypatch, capsys):
    monkeypatch.setattr(indexed, "SHORT", 0.0)
    check([write_pairs(f"{name}.tar", 0, 1) for name in "ab"])
    assert "| 2/2 [" in capsys.readouterr().err


# === The captions of a source ===


@pytest.mark.parametrize("name", ["x.tar", ""])
def test_captions_in_utf_16_are_refused_by_name(write_tar, tmp_path, name):
    text = "\ufeffein Hünd 猫".encode("utf-16-le" if name else "utf-16-be")
    write_tar("x.tar", [("a.png", b"png"), ("a.txt", text)])
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(text)
    for read in (read_captions, lambda x: image_text_dataset(x, len, 16, 1, False)):
        with pytest.raises(ValueError, match=rf"'a.*/{name}.*UTF-16.*save it as UTF-8"):
            read(tmp_path / name)


def test_captions_of_unreadable_letters_are_kept(write_tar):
    text = "\N{REPLACEMENT CHARACTER}" * 3
    assert read_captions(write_tar("x.tar", [("a.txt", text.encode())])) == [text]


def test_all_captions_of_intact_samples_are_read(write_pairs):
    whole = write_pairs("a.tar", 0, 130)
    # A pair is four blocks.
    cut = write_pairs("b.tar", 3, 3)
    cut.write_bytes(cut.read_bytes()[: 512 * 10])
    assert read_captions(whole) == [f"no {n}" for n in range(130)]
    with pytest.warns(UserWarning, match="b.tar is damaged after the sample"):
        assert read_captions([whole, cut])[130:] == ["no 3", "no 4"]


def test_captions_are_read_without_image_files(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,sentence\nmissing.png,one\n")
    assert read_captions(tmp_path, "sentence") == ["one"]
    with pytest.raises(ValueError, match=r"`caption_key` .*Received: .*'sentence'"):
        read_captions(tmp_path)
    assert read_captions([{"image": b"j", "caption": ["a", "b"]}]) == ["a", "b"]
