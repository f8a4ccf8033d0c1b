"""Which captions an image has, and which of them is used."""

import json

import pytest

from keras_cluster_mask.data import files, image_text_dataset, read_captions
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import Pair, PairReader
from keras_cluster_mask.data.samples import Captions

pytestmark = pytest.mark.any_backend


def captions_of(sample, caption_key=None):
    return PairReader([], caption_key=caption_key).captions(sample)


def test_of_several_fields_the_first_that_is_not_empty_is_used():
    keys = ("caption", "txt", "json.alt")
    sample = {"txt": b"text", "caption": b"caption", "json": b'{"alt": "json"}'}
    assert captions_of(sample, keys) == (("caption",), None)
    sample["caption"] = b" \n"
    assert captions_of(sample, keys) == (("text",), None)
    del sample["caption"]
    assert captions_of(sample, keys) == (("text",), None)
    del sample["txt"]
    assert captions_of(sample, keys) == (("json",), None)
    assert captions_of({**sample, "json": b'{"alt": ""}'}, keys) == (
        (),
        "empty caption",
    )
    assert captions_of({}, keys) == ((), "no caption")


def test_entries_of_json_are_found_at_any_depth():
    content = {"a": {"b": {"c": "deep"}}, "list": ["one", "", "two"], "n": 3}
    sample = {"json": json.dumps(content).encode(), "x.json": b'{"a": "dots"}'}
    assert captions_of(sample, "json.a.b.c") == (("deep",), None)
    assert captions_of(sample, "json.list") == (("one", "two"), None)
    # A field may have dots in its own name.
    assert captions_of({"x.json": b"itself"}, "x.json") == (("itself",), None)
    for missing in ("json.a.b.x", "json.a.b.c.d", "json.list.0", "json.x", "other.a"):
        assert captions_of(sample, missing) == ((), "no caption")
    # Only text is a caption.
    for other in ("json.a", "json.n"):
        assert captions_of(sample, other) == ((), "empty caption")
    # In JSON lines, a field is an object already.
    assert captions_of({"meta": content}, "meta.a.b.c") == (("deep",), None)


def test_each_line_of_txt_is_a_caption_unless_json_or_the_key_says_otherwise():
    sample = {"txt": b" one\r\n\ntwo \n", "json": b'{"caption": null}'}
    assert captions_of(sample) == (("one", "two"), None)
    for whole in ((sample, "txt"), ({**sample, "json": b'{"caption": "one"}'},)):
        assert captions_of(*whole) == (("one\r\n\ntwo",), None)
    # Only files of this name.
    assert captions_of({"caption": "one\ntwo"}) == (("one\ntwo",), None)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff", b"[" * 100_000, b'"text"', b"null", b"[1]"]
)
def test_json_that_cannot_be_read_holds_no_caption(content):
    assert captions_of({"json": content}, "json.caption") == ((), "no caption")


@pytest.mark.parametrize("value", [3, 0.5, True, {"a": "b"}, [1, None, [b"x"]], [], ""])
def test_values_other_than_text_are_empty_captions(value):
    assert captions_of({"txt": value}) == ((), "empty caption")


def test_bytes_that_are_no_utf_8_are_replaced():
    assert captions_of({"txt": b"caf\xe9 \xf0\x9f\x90\x88"}) == (
        ("caf\N{REPLACEMENT CHARACTER} \N{CAT}",),
        None,
    )


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


def test_half_letters_are_not_changed():
    pair = Pair(b"", ("{} \ud800",), "1", "x")
    captions = Captions(None, False, include_captions=True)
    batch = captions.batch([pair], [None], [0])
    assert batch["captions"].tolist() == [b"{} \xed\xa0\x80"]


# === The captions of a source ===


def test_all_captions_of_intact_samples_are_read(write_pairs, write_tar):
    whole = write_pairs("a.tar", 0, 130)
    # A pair is four blocks.
    cut = write_pairs("b.tar", 3, 3)
    cut.write_bytes(cut.read_bytes()[: 512 * 10])
    assert read_captions(whole) == [f"no {n}" for n in range(130)]
    with pytest.warns(UserWarning, match="b.tar is damaged after the sample"):
        assert read_captions([whole, cut])[130:] == ["no 3", "no 4"]
    files = [("1.jpg", b"j"), ("1.json", b'{"all": ["one", "two"]}'), ("1.txt", b"t")]
    other = write_tar("c.tar", files)
    assert read_captions(other) == ["t"]
    assert read_captions(other, ["x", "json.all"]) == ["one", "two"]


def test_a_shard_that_cannot_be_read_is_an_error(write_pairs, monkeypatch):
    def fail(ranges):
        return [OSError(5, "no disk")] * len(ranges)

    paths = [write_pairs("a.tar", 0, 3), write_pairs("b.tar", 3, 3)]
    read_captions(paths)
    monkeypatch.setattr(files, "read_ranges", fail)
    with pytest.raises(OSError, match=r"the shard cannot be read: .*a\.tar"):
        read_captions(paths)


def test_captions_are_read_without_image_files(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\nmissing.png,one\n")
    assert read_captions(tmp_path) == ["one"]
    assert read_captions([{"image": b"j", "caption": ["a", "b"]}]) == ["a", "b"]


def test_a_source_in_which_no_caption_is_found_is_an_error(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,sentence\n1.png,one\n")
    with pytest.raises(ValueError, match=r"`caption_key` .*Received: .*'sentence'"):
        read_captions(tmp_path)
    assert read_captions(tmp_path, "sentence") == ["one"]


def test_rows_without_an_image_are_samples_of_their_own(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("caption\none\ntwo\n")
    assert len(open_index(path, PairReader(()))) == 2
