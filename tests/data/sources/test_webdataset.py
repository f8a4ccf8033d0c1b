import contextlib
import gzip
import io
import tarfile

import pytest

from keras_cluster_mask.data.sources import ShardError, read_samples, webdataset

pytestmark = pytest.mark.any_backend

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


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
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


@pytest.mark.parametrize(("blocks", "whole"), [(4, 0), (8, 1)])
def test_a_header_of_zeros_is_not_taken_for_the_end(write_tar, blocks, whole):
    path = write_tar("x.tar", FILES)
    content = bytearray(path.read_bytes())
    content[512 * blocks : 512 * (blocks + 1)] = bytes(512)
    path.write_bytes(content)
    samples = read_samples(path)
    assert [next(samples) for _ in range(whole)] == SAMPLES[:whole]
    with pytest.raises(ShardError, match="zeros") as error:
        next(samples)
    assert error.value.sample == SAMPLES[whole]


def test_a_download_of_which_the_rest_is_zeros_is_damaged(write_tar):
    path = write_tar("x.tar", FILES)
    # Some programs make a file as long as it will be before they fetch it.
    path.write_bytes(path.read_bytes()[: 512 * 8] + bytes(2**21))
    with pytest.raises(ShardError, match="zeros"):
        list(read_samples(path))


def test_a_tar_may_end_with_one_block_of_zeros_or_with_many(write_tar):
    path = write_tar("x.tar", FILES)
    content = path.read_bytes()[: 512 * 10]
    for end in (512, 1024, 2**20):
        path.write_bytes(content + bytes(end))
        assert list(read_samples(path)) == SAMPLES


def test_a_second_tar_after_the_first_is_not_left_out_in_silence(write_tar):
    path = write_tar("x.tar", FILES)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ShardError, match="zeros"):
        list(read_samples(path))


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_of_a_damaged_compressed_tar_nothing_is_given(write_tar, compression):
    # Unchecked, a flipped bit of a gz shows as another caption.
    path = write_tar("x.tar", FILES, f"w:{compression}")
    content = path.read_bytes()
    harmless = 0
    for place in range(30, len(content) - 12):
        flipped = bytearray(content)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        read = []
        with contextlib.suppress(ShardError):
            read.extend(read_samples(path))
        # A bit may mean nothing.
        assert read in ([], SAMPLES)
        harmless += bool(read)
    assert harmless < 0.2 * len(content)


def test_a_gz_of_several_parts_is_read_to_its_end(write_tar):
    # As pigz and bgzip write them.
    path = write_tar("x.tar", FILES)
    content = path.read_bytes()
    path.write_bytes(gzip.compress(content[:1300]) + gzip.compress(content[1300:]))
    assert list(read_samples(path)) == SAMPLES


def add(archive, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name",
    [
        "a cat on a mat",
        "ein Hündchen 子犬",
        "odd\udcff\udcfebytes",
        "n" * 101,
        "folder/" * 40 + "n" * 300,
        "/absolute/1",
        "../../1",
        "-rf *",
        "new\nline",
    ],
)
def test_odd_and_long_names_are_keys(tmp_path, format, name):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as archive:
        for ending in ("jpg", "txt"):
            add(archive, f"{name}.{ending}", ending.encode())
    (sample,) = read_samples(path)
    assert sample == {"__key__": name, "jpg": b"jpg", "txt": b"txt"}


def test_names_with_several_dots_end_at_the_first(write_tar):
    files = [("v1.0/a.b.JPG", b"1"), ("v1.0/a.txt", b"2"), ("noend.", b"3")]
    (sample,) = read_samples(write_tar("x.tar", files))
    assert sample == {"__key__": "v1.0/a", "b.jpg": b"1", "txt": b"2"}


def test_endings_that_mean_something_else_here_are_left_out(write_tar):
    files = [("1.jpg", b"j"), ("1.__KEY__", b"other"), ("1.txt", b"t")]
    files.append(("1.__fault__", b"none"))
    (sample,) = read_samples(write_tar("x.tar", files))
    assert sample == {"__key__": "1", "jpg": b"j", "txt": b"t"}


def test_folders_and_devices_are_left_out_and_links_have_no_content(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "folder.jpg", kind=tarfile.DIRTYPE)
        add(archive, "1.jpg", b"j")
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
            add(archive, "1.png", kind=kind)
        add(archive, "1.txt", b"t")
        # Whoever counts samples must see them.
        add(archive, "2.jpg", kind=tarfile.LNKTYPE, link="1.jpg")
        add(archive, "3.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(archive, "3.txt", b"t")
    assert list(read_samples(path)) == [
        {"__key__": "1", "jpg": b"j", "txt": b"t"},
        {"__key__": "2"},
        {"__key__": "3", "txt": b"t"},
    ]


def test_what_is_too_large_is_not_read(write_tar, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 5)
    files = [("1.jpg", b"12345"), ("1.txt", b"123456"), ("2.jpg", b"1")]
    assert list(read_samples(write_tar("x.tar", files))) == [
        {"__key__": "1", "jpg": b"12345", "txt": None},
        {"__key__": "2", "jpg": b"1"},
    ]


def test_a_size_beyond_the_file_is_damage(tmp_path):
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("1.jpg")
    for size in (2000, 2**40, 2**80, -512):
        # Nor does it take as long as the file would be.
        member.size = size
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(ShardError, match=r"x\.tar"):
            list(read_samples(path))


def test_a_sparse_file_is_read_with_its_holes(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.txt")
        # A byte at the place 3, and two at 8.
        content = b"2\n3\n1\n8\n2\n".ljust(512, b"\0") + b"abc"
        member.size = len(content)
        member.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "1.txt",
            "GNU.sparse.realsize": "10",
        }
        archive.addfile(member, io.BytesIO(content))
    (sample,) = read_samples(path)
    assert sample == {"__key__": "1", "txt": b"\0\0\0a\0\0\0\0bc"}
