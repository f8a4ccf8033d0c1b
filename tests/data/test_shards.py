import gzip

import pytest

from keras_cluster_mask.data import list_shards
from keras_cluster_mask.data.sources import ShardError, read_samples

FILES = [
    ("a/1.jpg", b"one"),
    ("a/1.txt", b"first"),
    ("a/2.jpg", b"two\0\0"),
    ("a/2.seg.PNG", b"mask"),
    ("b/2.txt", b"second"),
]
SAMPLES = [
    {"__key__": "a/1", "jpg": b"one", "txt": b"first"},
    {"__key__": "a/2", "jpg": b"two\0\0", "seg.png": b"mask"},
    {"__key__": "b/2", "txt": b"second"},
]


@pytest.fixture
def folder(tmp_path):
    for name in ("train-00.tar", "train-01.tar", "train-02.tar", "test-[x].tar"):
        (tmp_path / name).touch()
    return tmp_path


def names(source):
    return [shard.rpartition("/")[2] for shard in list_shards(source)]


def test_paths_patterns_and_lists_name_shards_sorted_and_once(folder):
    every = ["train-00.tar", "train-01.tar", "train-02.tar"]
    assert names(folder / "train-01.tar") == ["train-01.tar"]
    assert names(str(folder / "train-*.tar")) == every
    assert names(f"{folder}/train-{{00..02}}.tar") == every
    assert names(f"{folder}/train-{{02,00}}.tar") == ["train-00.tar", "train-02.tar"]
    assert names(f"{folder}/train-{{0{{0,1}},02}}.tar") == every
    assert names(f"{folder}/{{train,tr*}}-0{{1..2}}.tar") == every[1:]
    assert names([folder / "train-02.tar", f"{folder}/*0[12].tar"]) == every[1:]
    assert names(folder / "test-[x].tar") == ["test-[x].tar"]


def test_missing_shards_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"missing.*train-03\.tar"):
        list_shards(f"{folder}/train-{{00..03}}.tar")
    with pytest.raises(FileNotFoundError, match=r"pattern.*valid-\*\.tar"):
        list_shards(folder / "valid-*.tar")
    with pytest.raises(FileNotFoundError, match=r"Received a folder"):
        list_shards(folder)
    with pytest.raises(ValueError, match=r"`source`.*Received: \[\]"):
        list_shards([])
    with pytest.raises(ValueError, match=r"`source`.*\{2\.\.0\}"):
        list_shards("train-{2..0}.tar")
    with pytest.raises(ValueError, match=r"`source`.*\{a\}"):
        list_shards("train-{a}.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_neighbouring_files_of_a_name_are_a_sample(write_tar, mode):
    assert list(read_samples(write_tar("x.tar", FILES, mode))) == SAMPLES


def test_only_the_extensions_asked_for_are_read(write_tar):
    samples = list(read_samples(write_tar("x.tar", FILES), {"txt"}))
    expected = [{"__key__": "a/1", "txt": b"first"}, {"__key__": "a/2"}, SAMPLES[2]]
    assert samples == expected


def test_hidden_files_and_folder_prefixes_do_not_matter(write_tar):
    files = [
        ("./1.jpg", b"j"),
        ("./._1.jpg", b"x"),
        ("README", b"x"),
        ("./1.txt", b"t"),
    ]
    expected = [{"__key__": "1", "jpg": b"j", "txt": b"t"}]
    assert list(read_samples(write_tar("x.tar", files))) == expected


def test_a_repeated_extension_starts_a_new_sample(write_tar):
    samples = list(read_samples(write_tar("x.tar", FILES[:2] * 2)))
    assert samples == SAMPLES[:1] * 2


def test_an_empty_tar_has_no_samples(write_tar):
    assert list(read_samples(write_tar("x.tar", []))) == []


# A file takes a block of header and a block of content: 2 x 512 bytes.
@pytest.mark.parametrize(
    ("blocks", "whole", "begun"),
    [
        (0.5, [], {}),
        (1, [], {"__key__": "a/1"}),
        (2, [], {"__key__": "a/1", "jpg": b"one"}),
        (4, [], SAMPLES[0]),
        (4.2, [], SAMPLES[0]),
        (5.001, SAMPLES[:1], {"__key__": "a/2"}),
        (8, SAMPLES[:1], SAMPLES[1]),
        (9.003, SAMPLES[:2], {"__key__": "b/2"}),
    ],
)
def test_a_truncated_tar_gives_what_is_whole_then_an_error_with_the_rest(
    write_tar, blocks, whole, begun
):
    path = write_tar("x.tar", FILES)
    path.write_bytes(path.read_bytes()[: int(512 * blocks)])
    samples = read_samples(path)
    assert [next(samples) for _ in whole] == whole
    with pytest.raises(ShardError, match=rf"{path} is damaged") as error:
        next(samples)
    assert error.value.sample == begun
    assert error.value.last_key == begun.get("__key__")
    assert str(begun.get("__key__", "start")) in str(error.value)


def test_damage_within_a_tar_is_not_taken_for_its_end(write_tar):
    path = write_tar("x.tar", FILES)
    content = bytearray(path.read_bytes())
    content[512 * 8 : 512 * 9] = b"\xab" * 512
    path.write_bytes(content)
    samples = read_samples(path)
    assert next(samples) == SAMPLES[0]
    with pytest.raises(ShardError, match="a/2") as error:
        next(samples)
    assert error.value.sample == SAMPLES[1]


def test_what_is_no_tar_or_a_broken_archive_is_a_shard_error(write_tar, tmp_path):
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("no tar " * 1000)
    whole = gzip.compress(write_tar("x.tar", FILES).read_bytes())
    (tmp_path / "cut.tar").write_bytes(whole[:-20])
    for name in ("empty.tar", "text.tar", "cut.tar"):
        with pytest.raises(ShardError, match=name):
            list(read_samples(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(read_samples(tmp_path / "missing.tar"))
