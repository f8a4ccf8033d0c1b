import io
import json
import re

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.search import ImageIndex, Match, nearest
from tests.search.conftest import unit_rows


def keys_of(count):
    return [f"{row}.jpg" for row in range(count)]


def rows_of(matches):
    return [[match.row for match in each] for each in matches]


@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("block", [50, 700, 2**22])
def test_search_is_the_order_of_similarity(k, block, monkeypatch):
    monkeypatch.setattr(nearest, "SIMILARITIES", block)
    monkeypatch.setattr(nearest, "QUERIES", 11)
    rows, queries = unit_rows(300), unit_rows(40, seed=1)
    found = ImageIndex(rows, keys_of(300)).search(queries, k)
    similarity = queries @ rows.T
    expected = np.argsort(-similarity, axis=1)[:, :k]
    np.testing.assert_array_equal(rows_of(found), expected)
    np.testing.assert_allclose(
        [[match.similarity for match in each] for each in found],
        np.take_along_axis(similarity, expected, axis=1),
        atol=1e-6,
    )
    assert found[0][0].key == f"{expected[0, 0]}.jpg"


@pytest.mark.parametrize("block", [7, 2**22])
def test_equal_pictures_are_in_the_order_of_rows(block, monkeypatch):
    monkeypatch.setattr(nearest, "SIMILARITIES", block)
    kinds = unit_rows(3, width=96)
    which = np.random.default_rng(0).integers(0, 3, 50)
    index = ImageIndex(kinds[which], keys_of(50))
    for queries in (kinds[:1], unit_rows(30, width=96, seed=1)):
        for query, matches in zip(queries, index.search(queries, k=50)):
            order = np.lexsort((np.arange(50), -(kinds @ query)[which]))
            assert [match.row for match in matches] == order.tolist()


def test_one_query_gives_one_list_and_its_length_does_not_matter():
    rows = unit_rows(20)
    index = ImageIndex(rows, keys_of(20))
    best, *_ = index.search(7.0 * rows[3], k=2)
    assert best == Match("3.jpg", pytest.approx(1.0), 3, None)
    assert index.search(rows[3:4], k=2)[0][0].row == 3


def test_all_pictures_are_found_where_k_is_larger():
    matches = ImageIndex(unit_rows(4), keys_of(4)).search(unit_rows(1)[0], k=10)
    assert sorted(match.row for match in matches) == [0, 1, 2, 3]


def test_approximate_search_finds_most_of_what_exact_search_finds():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centers = unit_rows(40, width=32)
    rows = centers[rng.integers(0, 40, 4000)] + 0.1 * rng.normal(size=(4000, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = ImageIndex(rows, keys_of(4000))
    queries = centers + 0.1 * rng.normal(size=(40, 32))
    exact = index.search(queries, k=10)
    found = index.search(queries, k=10, approximate=True)
    shared = [len({*a} & {*b}) for a, b in zip(rows_of(exact), rows_of(found))]
    assert np.mean(shared) > 9.5
    # And those that both find they give alike.
    assert found[0][0] == exact[0][0]
    assert len(index.search(queries[0], k=4000, approximate=True)) <= 4000


@pytest.mark.parametrize("count", [1, 5])
def test_approximate_search_works_on_few_pictures(count):
    pytest.importorskip("faiss")
    rows = unit_rows(count)
    index = ImageIndex(rows, keys_of(count))
    (found,) = index.search(rows[:1], k=10, approximate=True)
    assert [m.row for m in found] == np.argsort(-(rows @ rows[0])).tolist()


def test_without_faiss_an_approximate_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ImageIndex(unit_rows(4), keys_of(4)).search(unit_rows(1), approximate=True)


# === Building ===


def test_embeddings_at_hand_are_an_index_too(model, folder, index):
    batches = kcm.data.ImageTextBatches(
        folder, None, 16, 4, training=False, include_keys=True, include_paths=True
    )
    found = kcm.evaluation.embed(model, batches, verbose=0)
    own = ImageIndex(found["image_embeddings"], found["keys"], found["paths"])
    assert (own.keys, own.paths) == (index.keys, index.paths)
    np.testing.assert_allclose(own.embeddings, index.embeddings, atol=1e-5)


def test_pictures_of_a_folder_are_embedded_in_the_order_of_names(model, folder, index):
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    )
    assert index.keys == names
    assert index.paths == [f"{folder}/{name}" for name in names]
    assert (len(index), index.num_skipped) == (9, 0)
    batches = kcm.data.ImageTextBatches(folder, None, 16, 9, training=False)
    (images,) = [batch["images"] for batch in batches]
    expected = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-5)


def test_pictures_of_shards_have_keys_alone(model, write_pairs, folder):
    shard = write_pairs("a.tar", 0, 5)
    sources = [shard, folder / "2024" / "0.png"]
    index = ImageIndex.build(model, sources, verbose=0)
    assert index.keys == ["0.png", *(f"{n:04}" for n in range(5))] or index.keys == [
        *(f"{n:04}" for n in range(5)), "0.png",
    ]  # fmt: skip
    paths = dict(zip(index.keys, index.paths))
    assert paths.pop("0.png") == str(folder / "2024" / "0.png")
    assert {*paths.values()} == {None}


def test_a_relative_source_is_found_from_elsewhere(
    model, folder, monkeypatch, tmp_path
):
    monkeypatch.chdir(folder)
    index = ImageIndex.build(model, "2024", verbose=0)
    monkeypatch.chdir(tmp_path)
    assert Image.open(index.paths[0]).size[0] > 0


def test_broken_pictures_are_left_out_and_counted(model, png, tmp_path):
    (tmp_path / "whole.png").write_bytes(png())
    for name in ("a.png", "z.jpg"):
        (tmp_path / name).write_bytes(png()[:40])
    with pytest.warns(UserWarning, match="does not decode"):
        index = ImageIndex.build(model, tmp_path, verbose=0)
    assert (index.keys, index.num_skipped) == (["whole.png"], 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_source_of_nothing_is_named(model, png, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\): .*nowhere"):
        ImageIndex.build(model, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"or pictures\. Received .*empty"):
        ImageIndex.build(model, tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(png()[:40])
    with pytest.raises(ValueError, match=r"that can be read\. Received: .*empty"):
        ImageIndex.build(model, tmp_path / "empty", verbose=0)


def test_a_model_that_takes_images_of_any_size_needs_one(folder, tokenizer):
    images = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3)(images))
    ids = keras.Input((8,), dtype="int32")
    y = keras.layers.Embedding(tokenizer.vocabulary_size, 8)(ids)
    y = keras.layers.GlobalAveragePooling1D()(y)
    model = kcm.ContrastiveModel(keras.Model(images, x), keras.Model(ids, y))
    with pytest.raises(ValueError, match="`image_size` must be given"):
        ImageIndex.build(model, folder)
    index = ImageIndex.build(model, folder, image_size=(12, 20), verbose=0)
    assert index.fingerprint.image_size == (12, 20)
    searcher = kcm.search.Searcher(model, index)
    found = searcher.by_image(index.paths[4], k=1).matches[0]
    assert (found.row, found.similarity) == (4, pytest.approx(1.0, abs=1e-5))


# === Files ===


def test_a_saved_index_is_the_same(index, tmp_path):
    index.save(tmp_path / "new" / "index.npz")
    loaded = ImageIndex.load(tmp_path / "new" / "index.npz")
    np.testing.assert_array_equal(loaded.embeddings, index.embeddings)
    assert (loaded.keys, loaded.paths) == (index.keys, index.paths)
    assert loaded.fingerprint.embedding == index.fingerprint.embedding
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index.npz"]


def test_half_precision_halves_the_file_and_finds_the_same(tmp_path):
    index = ImageIndex(unit_rows(2000, 64), keys_of(2000))
    index.save(tmp_path / "32.npz")
    index.save(tmp_path / "16.npz", dtype="float16")
    sizes = [(tmp_path / f"{bits}.npz").stat().st_size for bits in (16, 32)]
    assert sizes[1] - sizes[0] == 2000 * 64 * 2
    loaded = ImageIndex.load(tmp_path / "16.npz")
    assert loaded.embeddings.dtype == "float32"
    query = index.embeddings[7]
    exact, rounded = index.search(query, k=1)[0], loaded.search(query, k=1)[0]
    assert exact.key == rounded.key == "7.jpg"
    assert rounded.similarity == pytest.approx(exact.similarity, abs=1e-3)


def test_odd_names_come_back_as_they_were(tmp_path):
    keys = ["猫/ネコ.jpg", "a\nb", "\udcff.png", "", "🐶"]
    ImageIndex(unit_rows(5), keys, paths=keys).save(tmp_path / "index.npz")
    loaded = ImageIndex.load(tmp_path / "index.npz")
    assert loaded.keys == loaded.paths == keys


def test_only_an_index_is_replaced_by_another(index, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in \.npz.*Received: "):
        index.save(tmp_path / "model.keras")
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.ones(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`path`.*something else.*Received: "):
        index.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("count", [1003, 1537])
@pytest.mark.parametrize("queries", [1, 2])
def test_equal_rows_come_in_their_order_whatever_is_asked_together(count, queries):
    row = unit_rows(1)
    found = ImageIndex(np.repeat(row, count, 0), range(count))
    for matches in found.search(np.repeat(row, queries, 0), k=5):
        assert [match.row for match in matches] == [0, 1, 2, 3, 4]


def test_an_interrupted_save_leaves_the_index_before(index, tmp_path, monkeypatch):
    path = tmp_path / "index.npz"
    index.save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        index.save(path)
    assert path.read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 1


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def described(**entries):
    return np.frombuffer(json.dumps(entries).encode(), "uint8")


def pickled():
    file = io.BytesIO()
    np.savez(file, description=np.array([{"a": 1}], object), embeddings=unit_rows(1))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no index",
        npz(other=np.ones(3)),
        npz(description=described(format="another")),
        npz(description=described(format="keras_cluster_mask.ImageIndex", version=1)),
        npz(description=np.frombuffer(b"\xff{", "uint8")),
        npz(description=described()[:0]),
        npz(description=np.frombuffer(b"[1]", "uint8")),
        pickled(),
    ],
)
def test_what_is_no_index_is_refused(content, tmp_path):
    path = tmp_path / "index.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a file .* Received: path="):
        ImageIndex.load(path)


def test_an_array_file_is_refused(tmp_path):
    np.save(tmp_path / "index.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"`ImageIndex\.save` wrote"):
        ImageIndex.load(tmp_path / "index.npy")


def test_a_damaged_index_is_refused(index, tmp_path):
    path = tmp_path / "index.npz"
    index.save(path)
    whole = path.read_bytes()
    for place in range(100, len(whole), len(whole) // 7):
        changed = bytearray(whole)
        changed[place] ^= 64
        path.write_bytes(changed)
        try:
            loaded = ImageIndex.load(path)
        except ValueError:
            continue
        # What was hit says nothing, such as the date of an entry.
        np.testing.assert_array_equal(loaded.embeddings, index.embeddings)
        assert loaded.keys == index.keys
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        ImageIndex.load(path)


def test_an_index_of_another_version_is_refused(tmp_path):
    entries = described(format="keras_cluster_mask.ImageIndex", version=2, what="else")
    (tmp_path / "index.npz").write_bytes(npz(description=entries))
    with pytest.raises(
        ValueError, match=r"of version 1.* Received: version 2 in .*npz"
    ):
        ImageIndex.load(tmp_path / "index.npz")


# === What makes no sense ===


def test_bad_embeddings_are_named():
    rows = unit_rows(6)
    with pytest.raises(ValueError, match=r"shape=\(6, 8\), 5 keys"):
        ImageIndex(rows, keys_of(5))
    with pytest.raises(ValueError, match="2 paths and 6 keys"):
        ImageIndex(rows, keys_of(6), paths=["a", "b"])
    with pytest.raises(ValueError, match=r"shape=\(0, 8\)"):
        ImageIndex(rows[:0], [])
    rows[2, 1], rows[4] = np.nan, 2 * rows[4]
    expected = "2 rows that are not, the first of them 2 ('2.jpg', length nan), 4 ('4"
    with pytest.raises(ValueError, match=re.escape(expected)):
        ImageIndex(rows, keys_of(6))


@pytest.mark.parametrize("k", [0, -1, 2.5, None])
def test_k_must_be_a_count(k):
    with pytest.raises(ValueError, match=f"`k` must be .* Received: k={k}"):
        ImageIndex(unit_rows(6), keys_of(6)).search(unit_rows(1), k=k)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.ones((2, 9)), r"as wide as those of the index, 8.*shape=\(2, 9\)"),
        (np.ones((0, 8)), "at least one query"),
        (np.ones((1, 2, 8)), r"shape=\(1, 2, 8\)"),
        (np.full((2, 8), np.nan), r"queries \[0, 1\] are not"),
        (np.eye(9, 8), r"queries \[8\] are not"),
    ],
)
def test_queries_that_cannot_be_searched_are_named(queries, message):
    with pytest.raises(ValueError, match=message):
        ImageIndex(unit_rows(6), keys_of(6)).search(queries)


def test_another_type_of_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`dtype` must be .* Received: dtype='int8'"):
        ImageIndex(unit_rows(1), keys_of(1)).save(tmp_path / "x.npz", dtype="int8")
