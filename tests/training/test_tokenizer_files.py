"""The tokenizer of a model: that it is saved and loaded, and left alone by Keras."""

import copy
import json
import sys
import types
import warnings
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.training.checkpoints import describe_run
from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.training.model_tokenizer import (
    PRESET_FOLDER,
    identity_of,
    load_tokenizer,
    save_in_preset,
)
from tests.encoders.test_pooled import bert
from tests.helpers import (
    CONTEXT,
    FAST,
    compiled_model,
    image_mlp,
    letters_as_tokens,
    random_pairs,
    reloaded,
    run_program,
    text_bag,
    tiny_metaclip,
    vit_encoder,
)
from tests.training.test_model_tokenizer import END, METACLIP_END, hugging_face

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]


def preprocessor():
    pytest.importorskip("tensorflow")
    models = pytest.importorskip("keras_hub").models
    tokenizer = models.BertTokenizer(WORDS)
    return models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=CONTEXT)


def ours():
    return kcm.data.CLIPTokenizer.train(["a dog"], 514, CONTEXT)


KINDS = {
    "keras_hub": preprocessor,
    "ours": ours,
    "Hugging Face": lambda: hugging_face(END, model_max_length=CONTEXT),
    "a function": lambda: letters_as_tokens,
}
UNSAVED = "The tokenizer is not saved with the model"


def reader(tokenizer):
    """A model for the ids of any of these tokenizers."""
    ids = keras.Input((CONTEXT,), dtype="int32")
    x = keras.layers.Embedding(600, 16)(ids)
    texts = keras.Model(ids, keras.layers.GlobalAveragePooling1D()(x))
    model = kcm.ContrastiveModel(image_mlp(), texts, tokenizer=tokenizer)
    model.compile("sgd", **FAST)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind, scores of images, the path of a trained model, and warnings."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    photos = [folder / f"{number}.png" for number in range(3)]
    for path, pixels in zip(photos, random_pairs(3)["images"]):
        Image.fromarray(pixels).save(path)
    for kind, make in KINDS.items():
        model, path = reader(make()), folder / f"{kind}.keras"
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model.fit(random_pairs(4), verbose=0)
            # Some are saved otherwise once they have been called.
            scores = model.encode_image(photos) @ model.encode_text(["a dog"]).T
            model.save(path)
        texts = [str(each.message) for each in found]
        made[kind] = scores[:, 0], path, [text for text in texts if UNSAVED in text]
    return made


def test_another_process_ranks_photographs_by_a_sentence(saved):
    paths = [path for _, path, _ in saved.values()]
    program = "tests/programs/read_words.py"
    printed = run_program(program, paths[0].parent, *paths).splitlines()
    found = dict(zip(saved, map(json.loads, printed)))
    for kind in ("keras_hub", "ours", "Hugging Face"):
        np.testing.assert_allclose(found[kind], saved[kind][0], atol=1e-5)
        assert np.ptp(found[kind]) > 1e-3
    # A function is not saved, which `fit` and `save` say.
    assert found["a function"] is None
    assert [len(texts) for *_, texts in saved.values()] == [0, 0, 0, 2]


@pytest.mark.any_backend
def test_a_file_grows_by_no_more_than_the_vocabulary(tmp_path):
    tokenizer = kcm.data.CLIPTokenizer.from_open_clip()
    tokenizer.save(tmp_path / "tokenizer.json")
    sizes = []
    for each in (None, tokenizer):
        compiled_model(tokenizer=each).save(tmp_path / "model.keras")
        sizes.append((tmp_path / "model.keras").stat().st_size)
    vocabulary = (tmp_path / "tokenizer.json").stat().st_size
    assert sizes[1] - sizes[0] < vocabulary + 1000


@pytest.mark.any_backend
def test_a_file_has_the_tokenizer_of_the_package(tmp_path):
    tokenizer = reloaded(reader(ours()), tmp_path).tokenizer
    assert tokenizer(["a dog"]).tolist() == ours()(["a dog"]).tolist()


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["keras_hub", "ours", "Hugging Face"])
def test_a_tokenizer_of_a_file_equals_the_one_that_was_saved(saved, kind):
    loaded = keras.saving.load_model(saved[kind][1]).tokenizer
    assert identity_of(loaded) == identity_of(KINDS[kind]())


def test_keras_does_not_track_a_tokenizer(tmp_path):
    def seen(model):
        settings = describe_run(model, types.SimpleNamespace(description={}))
        nested = [(type(x).__name__, x.trainable) for x in all_layers(model)]
        layers = [type(x).__name__ for x in model.layers]
        settings["tokenizer"] = None
        return model.built, layers, nested, len(model.weights), settings

    pack = preprocessor()
    text = pytest.importorskip("keras_hub").models.BertTextEmbedder(bert(), pack)
    model, without = (
        kcm.ContrastiveModel.from_encoders(vit_encoder(), text, projection_dim=8)
        for _ in range(2)
    )
    without.tokenizer = None
    assert (model.tokenizer, without.tokenizer) == (pack, None)
    for each in (model, without):
        each.text_encoder.trainable = False
        each.compile("sgd", **FAST)
    found = [seen(model)]
    ids = tokenize(pack, ["a dog"])
    # The first call has built it.
    assert pack.built
    found += [seen(model), seen(reloaded(model, tmp_path))]
    model.tokenizer = pack
    assert [*found, seen(model)] == [seen(without)] * 4
    # Weights alone are read whatever the tokenizer is.
    model.save_weights(tmp_path / "a.weights.h5")
    without.load_weights(tmp_path / "a.weights.h5")
    # Its vocabulary is in the file once, and not where another property leads to it.
    model.save(tmp_path / "named.keras")
    with zipfile.ZipFile(tmp_path / "named.keras") as file:
        (path,) = [x for x in file.namelist() if x.endswith("vocabulary.txt")]
    assert path.startswith("assets/tokenizer/")
    copied = copy.deepcopy(model)
    np.testing.assert_array_equal(tokenize(copied.tokenizer, ["a dog"]), ids)


@pytest.mark.any_backend
def test_a_model_is_loaded_without_the_library_of_its_tokenizer(saved, monkeypatch):
    _, path, _ = saved["Hugging Face"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match=r"`model.tokenizer`.*: .*transformers"):
        model = keras.saving.load_model(path)
    assert model.tokenizer is None


@pytest.mark.any_backend
def test_a_tokenizer_that_cannot_be_saved_does_not_end_a_run(tmp_path, monkeypatch):
    tokenizer = ours()
    model = compiled_model(tokenizer=tokenizer)

    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save", fail)
    with pytest.warns(UserWarning, match=f"{UNSAVED}.*Received: .*disk full"):
        loaded = reloaded(model, tmp_path)
    assert loaded.tokenizer is None


class Reader(kcm.ContrastiveModel):
    """A model that makes its own tokenizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "tokenizer": letters_as_tokens})


@pytest.mark.any_backend
def test_a_subclass_may_make_a_tokenizer_that_cannot_be_saved(tmp_path):
    model = Reader(image_mlp(), text_bag())
    with pytest.warns(UserWarning, match=UNSAVED):
        loaded = reloaded(model, tmp_path, custom_objects={"Reader": Reader})
    assert loaded.tokenizer is letters_as_tokens


@pytest.mark.any_backend
def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"`tokenizer` must be a callable.*Received: "):
        compiled_model(tokenizer="clip")


@pytest.mark.any_backend
def test_a_preset_has_a_tokenizer_of_hugging_face(tmp_path):
    tokenizer = hugging_face(METACLIP_END, model_max_length=CONTEXT)
    model = kcm.ContrastiveModel.from_backbone(tiny_metaclip(), tokenizer=tokenizer)
    model.save_to_preset(tmp_path)
    loaded = kcm.ContrastiveModel.from_preset(tmp_path)
    texts = ["two red boats"]
    expected = tokenize(tokenizer, texts)
    np.testing.assert_array_equal(tokenize(loaded.tokenizer, texts), expected)
    # Another tokenizer in the same folder replaces it.
    save_in_preset(ours(), str(tmp_path))
    assert load_tokenizer(tmp_path / PRESET_FOLDER) is None


@pytest.mark.any_backend
def test_a_preset_of_a_clip_needs_no_tensorflow(tmp_path, monkeypatch):
    tokenizer = ours()
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, CONTEXT)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    model.save_to_preset(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    loaded = kcm.ContrastiveModel.from_preset(tmp_path).tokenizer
    np.testing.assert_array_equal(loaded(["a dog"]), tokenizer(["a dog"]))
    merges = tmp_path / "assets" / "tokenizer" / "merges.txt"
    content = merges.read_text()
    merges.write_text("damaged x y z")
    with pytest.warns(UserWarning, match="`model.tokenizer`"):
        assert kcm.ContrastiveModel.from_preset(tmp_path).tokenizer is None
    merges.write_text(content)
    # The tokenizer of an earlier model is not loaded for another one.
    with pytest.warns(UserWarning, match=UNSAVED):
        save_in_preset(letters_as_tokens, str(tmp_path))
    assert kcm.ContrastiveModel.from_preset(tmp_path).tokenizer is None


def test_a_preset_beside_the_package_leaves_it(tmp_path):
    program = tmp_path / PRESET_FOLDER / "program.py"
    program.parent.mkdir()
    program.touch()
    save_in_preset(ours(), str(tmp_path))
    assert program.exists()
