import io
import tarfile

import pytest

from tests.data.reading import make_dataset, read_samples

pytestmark = pytest.mark.any_backend

FILES = [
    ("a/1.jpg", b"one"),
    ("a/1.txt", b"first"),
    ("a/2.jpg", b"two\0\0"),
    ("a/2.seg.PNG", b"mask"),
    ("b/2.txt", b"second"),
    ("b/2.jpg", b""),
]
SAMPLES = [
    ("a/1", {"jpg": b"one", "txt": b"first"}),
    ("a/2", {"jpg": b"two\0\0", "seg.png": b"mask"}),
    ("b/2", {"txt": b"second"}),
]
KEYS = [key for key, _ in SAMPLES]


def test_consecutive_files_of_a_name_are_a_sample(write_tar, read_all):
    assert read_all(write_tar("x.tar", FILES)) == (SAMPLES, [])
    _, faults = read_all(write_tar("x.tar", FILES[:2] * 2))
    assert faults == [("0", "two files with the same name")]


# === Damage ===


def overwritten(block, content):
    return lambda whole: whole[: 512 * block] + content + whole[512 * (block + 1) :]


# A file takes a block of header and a block of content: 2 x 512 bytes.
@pytest.mark.parametrize(
    ("damage", "intact"),
    [
        (lambda whole: b"", 0),
        (lambda whole: b"no tar " * 1000, 0),
        (lambda whole: whole[:256], 0),
        (lambda whole: whole[:512], 0),
        (lambda whole: whole[: 512 * 4], 0),
        (lambda whole: whole[: 512 * 5 + 1], 1),
        (lambda whole: whole[: 512 * 8], 1),
        (lambda whole: whole[: 512 * 9 + 2], 2),
        # Some programs reserve the length of a file before they fetch it.
        (lambda whole: whole[: 512 * 8] + bytes(2**21), 2),
        (overwritten(4, b"\xab" * 512), 1),
        (overwritten(8, b"\xab" * 512), 2),
        # Zeros in the middle are not the end.
        (overwritten(4, bytes(512)), 1),
        (overwritten(8, bytes(512)), 2),
        # Nor is a second tar left out in silence.
        (lambda whole: whole * 2, 3),
    ],
)
def test_a_damaged_tar_gives_only_intact_samples(
    write_tar, read_damaged, damage, intact
):
    path = write_tar("x.tar", FILES)
    path.write_bytes(damage(path.read_bytes()))
    keys, lost = read_damaged(path)
    assert lost > 0
    # Whether the last sample is complete cannot always be known.
    assert keys in (KEYS[:intact], KEYS[: max(intact - 1, 0)])


def test_a_tar_may_end_with_one_block_of_zeros_or_with_many(write_tar, read_all):
    path = write_tar("x.tar", FILES)
    content = path.read_bytes()[: 512 * 11]
    for end in (512, 1024, 2**20):
        path.write_bytes(content + bytes(end))
        assert read_all(path)[0] == SAMPLES


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_flipped_bit_never_invents_a_sample(write_tar, read_all):
    path = write_tar("x.tar", FILES[:4])
    whole = path.read_bytes()
    damaged = 0
    for place in range(0, 512 * 8, 7):
        content = bytearray(whole)
        content[place] ^= 4
        path.write_bytes(content)
        samples, faults = read_all(path)
        damaged += bool(faults)
        assert [key for key, _ in samples] in ([], KEYS[:1], KEYS[:2])
    # Half of the bytes are headers, whose checksums show any change.
    assert damaged > 200


def test_a_size_beyond_the_file_is_damage(tmp_path, read_damaged):
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("1.jpg")
    for size in (2000, 2**40, 2**80, -512):
        # Nor does it take as long as the file would be.
        member.size = size
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert read_damaged(path) == ([], 1)


# === Names and kinds of members ===


def add(archive, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize(
    "name",
    [
        "a cat on a mat",
        "ein Hündchen 子犬",
        "odd\udcff\udcfebytes",
        "n" * 95,
        "n" * 101,
        "folder/" * 20 + "n" * 90,
        "folder/" * 40 + "n" * 300,
        "/absolute/1",
        "../../1",
        "-rf *",
        "new\nline",
    ],
)
def test_odd_and_long_names_are_keys(tmp_path, read_all, format, name):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as archive:
        try:
            # The header of a long name lies before that of the file.
            for key in ("0", name, "2"):
                for ending in ("jpg", "txt"):
                    add(archive, f"{key}.{ending}", ending.encode())
        except ValueError:
            pytest.skip("the format cannot hold this name")
    with tarfile.open(path) as archive:
        assert f"{name}.txt" in archive.getnames()
    fields = {"jpg": b"jpg", "txt": b"txt"}
    assert read_all(path)[0] == [(key, fields) for key in ("0", name, "2")]


def test_names_end_at_the_first_dot_and_hidden_files_are_left_out(write_tar, read_all):
    files = [("./v1.0/a.b.JPG", b"1"), ("./._1.jpg", b"x"), ("README", b"x")]
    files += [("./v1.0/a.txt", b"2"), ("noend.", b"3")]
    expected = [("v1.0/a", {"b.jpg": b"1", "txt": b"2"})]
    assert read_all(write_tar("x.tar", files))[0] == expected


def test_folders_devices_and_links_are_left_out(tmp_path, read_all):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "folder.jpg", kind=tarfile.DIRTYPE)
        add(archive, "1.jpg", b"j")
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
            add(archive, "1.png", kind=kind)
        add(archive, "1.txt", b"t")
        add(archive, "2.jpg", kind=tarfile.LNKTYPE, link="1.jpg")
        add(archive, "3.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(archive, "3.txt", b"t")
        add(archive, "3.png", b"p")
    assert read_all(path)[0] == [
        ("1", {"jpg": b"j", "txt": b"t"}),
        ("3", {"txt": b"t", "png": b"p"}),
    ]


def test_all_images_before_all_texts_are_an_error_that_names_the_rule(write_tar):
    names = [f"{n}.{end}" for end in ("jpg", "txt") for n in range(6)]
    shard = write_tar("x.tar", [(name, b"-") for name in names])
    with pytest.raises(ValueError, match=r"no caption.*must be adjacent"):
        make_dataset(shard)


# === How many samples are lost ===


@pytest.mark.parametrize(
    ("damage", "found", "lost"),
    [
        # Five tars in one file.
        (lambda whole: whole * 5, 100, 400),
        (lambda whole: whole[:-409600] + b"\xab" * 409600, 90, 10),
        # Where the end is missing, as many as were found.
        (lambda whole: whole[: len(whole) // 10], 9, 9),
    ],
)
def test_lost_samples_are_counted_by_their_share_of_the_bytes(
    write_tar, read_damaged, damage, found, lost
):
    files = [(f"{n:03}.{end}", bytes(19968)) for n in range(100) for end in ("j", "t")]
    path = write_tar("x.tar", files)
    path.write_bytes(damage(path.read_bytes()))
    keys, count = read_damaged(path)
    assert abs(len(keys) - found) <= 1
    assert abs(count - lost) <= max(0.05 * lost, 1)


def test_a_shard_that_ends_too_early_lost_what_others_have(write_tar, tmp_path):
    files = [(f"{n}.{end}", b"-") for n in range(50) for end in ("jpg", "txt")]
    paths = [write_tar(f"{n}.tar", files) for n in range(2)]
    paths[0].write_bytes(paths[0].read_bytes()[: 4 * 512 * 10])
    with pytest.warns(UserWarning, match="About 41 samples are lost in 1 damaged"):
        samples, faults = read_samples(f"{tmp_path}/*.tar")
    assert (len(samples), len(faults)) == (59, 41)
