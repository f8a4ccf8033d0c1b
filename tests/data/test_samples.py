"""Which samples are pairs, and what is wrong with the others."""

import json

import pytest

from keras_cluster_mask.data.samples import Fault, Fields
from tests.data.reading import read_samples as read

pytestmark = pytest.mark.any_backend


def test_of_several_image_fields_the_first_that_exists_is_used(write_tar):
    files = [("1.png", b"png"), ("1.webp", b"webp"), ("1.txt", b"t")]
    shard = write_tar("x.tar", files)
    assert read(shard)[0][0].image == b"png"
    assert read(shard, image_keys=["jpg", "webp", "png"])[0][0].image == b"webp"
    assert read(shard, image_keys="jpg") == ([], [("1", "no image")])


def test_the_field_filename_holds_the_image_unless_another_holds_its_path():
    row = {"filename": "a.png", "text": "t"}
    for fields, path in (row, "a.png"), (row | {"filepath": "b/a.png"}, "b/a.png"):
        ((pair,), _) = read([fields])
        assert pair.path == path


def test_a_key_may_be_repeated_in_another_shard(write_pairs, write_tar):
    files = [("0001.jpg", b"j"), ("0001.txt", b"t")]
    source = [write_pairs("a.tar", 0, 3), write_tar("b.tar", files)]
    pairs, faults = read(source)
    assert [pair.key for pair in pairs] == ["0000", "0001", "0002", "0001"]
    assert faults == []


@pytest.mark.parametrize("image", [None, "", 3, [], [4], {"bytes": "x"}, [["a"]]])
def test_cells_that_name_no_file_are_no_images(tmp_path, image):
    lines = [{"id": 1, "image": image, "text": "t"}, {"id": 2, "text": "t"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    pairs, faults = read(path)
    assert pairs == []
    assert sorted(faults) == [("1", "no image"), ("2", "no image")]


# === Captions ===


def captions_of(sample, caption_key=None):
    """The captions of a sample, or what is wrong with them."""
    found = Fields([], caption_key=caption_key).sample({"__key__": "a", **sample})
    return found.reason if isinstance(found, Fault) else found.captions


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"txt": b"text", "caption": b"caption"}, ("caption",)),
        ({"txt": b"text", "caption": b" \n"}, ("text",)),
        ({"txt": b"text", "json": b'{"alt": "json"}'}, ("text",)),
        ({"json": b'{"alt": "json"}'}, ("json",)),
        ({"json": b'{"alt": ""}'}, "empty caption"),
        ({}, "no caption"),
    ],
)
def test_of_several_fields_the_first_that_is_not_empty_is_used(sample, expected):
    assert captions_of(sample, ("caption", "txt", "json.alt")) == expected


def test_entries_of_json_are_found_at_any_depth():
    content = {"a": {"b": {"c": "deep"}}, "list": ["one", "", "two"], "n": 3}
    sample = {"json": json.dumps(content).encode(), "x.json": b'{"a": "dots"}'}
    assert captions_of(sample, "json.a.b.c") == ("deep",)
    assert captions_of(sample, "json.list") == ("one", "two")
    # A field may have dots in its own name.
    assert captions_of({"x.json": b"itself"}, "x.json") == ("itself",)
    for missing in ("json.a.b.x", "json.a.b.c.d", "json.list.0", "json.x", "other.a"):
        assert captions_of(sample, missing) == "no caption"
    # Only text is a caption.
    for other in ("json.a", "json.n"):
        assert captions_of(sample, other) == "empty caption"
    # In JSON lines, a field is an object already.
    assert captions_of({"meta": content}, "meta.a.b.c") == ("deep",)


def test_each_line_of_txt_is_a_caption_unless_json_or_the_key_says_otherwise():
    sample = {"txt": b" one\r\n\ntwo \n", "json": b'{"caption": null}'}
    assert captions_of(sample) == ("one", "two")
    # Unlike `str.splitlines`.
    assert captions_of({"txt": "one\u2028two"}) == ("one\u2028two",)
    for whole in ((sample, "txt"), ({**sample, "json": b'{"caption": "one"}'},)):
        assert captions_of(*whole) == ("one\r\n\ntwo",)
    # Only files of this name.
    assert captions_of({"caption": "one\ntwo"}) == ("one\ntwo",)


@pytest.mark.parametrize(
    ("content", "key", "fault"),
    [
        *(
            (content, "txt.caption", "no caption")
            for content in (b"{", b"", b"\xff", b"[" * 100_000, b"null", b"[1]")
        ),
        *(
            (value, "txt", "empty caption")
            for value in (3, 0.5, True, {"a": "b"}, [1, None, [2]])
        ),
    ],
)
def test_what_holds_no_text_is_no_caption(content, key, fault):
    assert captions_of({"txt": content}, key) == fault


def test_bytes_that_are_no_utf_8_are_replaced():
    assert captions_of({"txt": b"caf\xe9 \xf0\x9f\x90\x88"}) == (
        "caf\N{REPLACEMENT CHARACTER} \N{CAT}",
    )


def test_a_byte_order_mark_is_no_part_of_a_caption():
    json = b'\xef\xbb\xbf{"captions": "one"}'
    for sample in {"txt": b"\xef\xbb\xbfone"}, {"txt": "\ufeffone"}, {"json": json}:
        assert captions_of(sample) == ("one",)
