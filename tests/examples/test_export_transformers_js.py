"""The folder for transformers.js: what its files take and return."""

import json

import keras
import numpy as np
import pytest
import tokenizers

import keras_cluster_mask as kcm
from tests.helpers import assert_close

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

CAPTIONS = ["a red boat", "a blue car", "It's 3 dogs, isn't it?"]


@pytest.fixture
def model():
    tokenizer = kcm.data.CLIPTokenizer.train(CAPTIONS * 9, 600, 16)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 16)
    return kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)


def test_the_files_embed_what_transformers_js_passes_to_them(model, tmp_path):
    if keras.backend.backend() != "torch":
        pytest.skip("Keras writes ONNX for batches of any size with torch.")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import export_transformers_js

    folder = tmp_path / "exported"
    export_transformers_js.export(model, folder)

    def run(part, inputs):
        session = onnxruntime.InferenceSession(folder / f"onnx/{part}_model.onnx")
        return session.run([f"{'image' if part == 'vision' else part}_embeds"], inputs)

    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), "uint8")
    pixels = images.transpose(0, 3, 1, 2).astype("float32")
    (found,) = run("vision", {"pixel_values": pixels})
    assert_close(found, model.encode_image(images), 1e-5)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 32}
    assert not processor["do_rescale"]
    assert not processor["do_normalize"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 16

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # transformers.js pads with the token that its configuration names.
    padding = tokenizer.token_to_id(config["pad_token"])
    tokenizer.enable_padding(pad_id=padding)
    ids = np.array([x.ids for x in tokenizer.encode_batch(CAPTIONS)])
    assert ids.max() == model.tokenizer.end_token_id
    (found,) = run("text", {"input_ids": ids})
    assert_close(found, model.encode_text(CAPTIONS), 1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "It\u2019s a dog\u2019s \u201clife\u201d, \u201ba\u201f \u0149",
        "cafe\u0301 nai\u0308ve A\u030angstro\u0308m \u1112\u1161\u11ab",
        "\ufb01ne \ufb02ow \u0132 \uff26\uff35\uff2c\uff2c\u3000\uff57 \uff76\uff9e",
        "tom &amp; jerry &lt;b&gt; &quot;hi&#39;&nbsp;&apos; &amp;lt;",
        "a\u00a0b\u2026c \u2014 d \u00bd \u00b2 \u2460 日本語 👩\u200d👧 ❤️ ẞ İ \u0345",
        "\ufeffzero\u200bwidth\x00\x1c\x0b \t\r\n\u2028 x\x85 \x93z\x94",
        "DON'T I'LL 100% $5.00 `x\u00b4",
    ],
)
def test_the_tokenizer_gives_the_ids_of_the_model(model, text):
    import export_transformers_js

    found = export_transformers_js.clip_tokenizer(model.tokenizer)
    found = tokenizers.Tokenizer.from_str(found.to_str())
    expected = model.tokenizer.with_context_length(99)([text])[0]
    assert found.encode(text).ids == expected[: expected.argmax() + 1].tolist()


def test_a_folder_that_is_not_empty_is_refused(model, tmp_path):
    import export_transformers_js

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"`folder` must be new or empty.*Received:"):
        export_transformers_js.export(model, tmp_path)


def test_the_export_asks_for_the_tokenizer_that_it_cannot_write(model, tmp_path):
    import export_transformers_js

    model.tokenizer = None
    with pytest.raises(SystemExit, match=r"`--tokenizer` must be given.*Received:"):
        export_transformers_js.export(model, tmp_path / "exported")


def test_a_tokenizer_that_is_given_replaces_that_of_the_model(model, tmp_path):
    import export_transformers_js

    given, folder = tmp_path / "given", tmp_path / "exported"
    given.mkdir()
    folder.mkdir()
    (given / "tokenizer.json").write_text("{}")
    (given / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    config = export_transformers_js.write_tokenizer(model.tokenizer, folder, given)
    assert config == {"model_max_length": 9}
    assert (folder / "tokenizer.json").read_text() == "{}"
