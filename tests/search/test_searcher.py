import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.search import ImageIndex, Searcher, SearchResult
from tests.search.conftest import CAPTIONS


@pytest.fixture(scope="module")
def searcher(model, index, tokenizer):
    return Searcher(model, index, tokenizer)


def order(result):
    return [match.row for match in result.matches]


def test_words_find_what_their_embeddings_are_most_similar_to(
    searcher, model, index, tokenizer
):
    results = searcher.by_text(CAPTIONS, k=9)
    texts = kcm.evaluation.embed_texts(model, CAPTIONS, tokenizer, verbose=0)
    expected = np.argsort(-(texts @ index.embeddings.T), axis=1)
    assert [order(result) for result in results] == expected.tolist()
    assert [result.query for result in results] == CAPTIONS
    single = searcher.by_text(CAPTIONS[1], k=9)
    assert isinstance(single, SearchResult)
    assert order(single) == expected[1].tolist()


def test_a_picture_finds_itself_whatever_it_comes_as(searcher, index):
    for row, path in [*enumerate(index.paths)][::4]:
        picture = Image.open(path)
        forms = [path, picture, np.asarray(picture), picture.convert("RGBA")]
        for result in searcher.by_image(forms, k=1):
            (match,) = result.matches
            assert match.row == row
            assert match.similarity == pytest.approx(1.0, abs=1e-4)
            assert result.is_image


def test_pictures_are_turned_and_read_as_those_of_an_index(searcher, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), "uint8")
    image = Image.fromarray(pixels).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    opened = Image.open(tmp_path / "turned.png")
    found = searcher.by_image([tmp_path / "turned.png", opened, upright, image], k=9)
    values = [[match.similarity for match in each.matches] for each in found]
    np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    np.testing.assert_allclose(values[2], values[0], atol=1e-5)
    assert np.abs(np.subtract(values[3], values[0])).max() > 1e-4
    for mode in ("L", "CMYK", "P", "1", "YCbCr", "F"):
        assert len(searcher.by_image(image.convert(mode)).matches) == 9
    grey = np.asarray(image.convert("L"))
    assert order(searcher.by_image(grey)) == order(searcher.by_image(grey[..., None]))


def test_a_saved_model_and_a_saved_index_are_read(model, index, tokenizer, tmp_path):
    model.save(tmp_path / "model.keras")
    index.save(tmp_path / "index.npz", dtype="float16")
    searcher = Searcher(tmp_path / "model.keras", tmp_path / "index.npz", tokenizer)
    expected = Searcher(model, index, tokenizer).by_text(CAPTIONS, k=1)
    found = searcher.by_text(CAPTIONS, k=1)
    assert [order(result) for result in found] == [order(result) for result in expected]


def test_an_index_of_another_model_is_refused(index, tokenizer):
    keras.utils.set_random_seed(5)
    size = tokenizer.vocabulary_size
    other = kcm.models.clip_backbone("tiny", 16, size, 8, 4)
    with pytest.raises(ValueError, match=r"that the index was built with; .*cosine"):
        Searcher(other, index)
    images, ids = keras.Input((16, 16, 3)), keras.Input((8,), dtype="int32")
    x = keras.layers.Dense(7)(keras.layers.Flatten()(images))
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(size, 7)(ids))
    narrow = kcm.ContrastiveModel(keras.Model(images, x), keras.Model(ids, y))
    with pytest.raises(ValueError, match=r"are 96 wide\. Received: .* 7"):
        Searcher(narrow, index)
    unknown = ImageIndex(index.embeddings, index.keys)
    with pytest.raises(ValueError, match="as wide as those of the index, 96"):
        Searcher(narrow, unknown, tokenizer).by_text("a")


def test_what_makes_no_sense_is_named(searcher, model, index, tmp_path):
    for texts in ("", "  ", [], ["a", ""], [b"a"], [None]):
        with pytest.raises(ValueError, match=r"`texts` must be .* Received: texts="):
            searcher.by_text(texts)
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        Searcher(model, index).by_text("a dog")
    with pytest.raises(ValueError, match="`k` must be"):
        searcher.by_text("a dog", k=0)
    with pytest.raises(ValueError, match=r"at least one. Received: images=\[\]"):
        searcher.by_image([])
    with pytest.raises(FileNotFoundError, match=r"Received: .*nowhere\.png"):
        searcher.by_image(tmp_path / "nowhere.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"does not decode\). Received: .*broken\.png"):
        searcher.by_image(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"ndarray of shape \(4, 4, 3\), float64"):
        searcher.by_image(np.ones((4, 4, 3)))
    with pytest.raises(ValueError, match="Received: NoneType"):
        searcher.by_image(None)


def test_ids_of_another_tokenizer_are_refused(model, index):
    searcher = Searcher(model, index, lambda texts: [[70_000] * 8] * len(texts))
    with pytest.raises(ValueError, match="another tokenizer"):
        searcher.by_text("a dog")
