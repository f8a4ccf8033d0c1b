"""Towers saved alone and exported."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution.backends import ONNX_PACKAGES
from keras_cluster_mask.encoders.towers import ImageTower, TextTower, Tower
from tests.encoders.test_pooled import bert, make_model
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    exported,
    functional_vit,
    random_images,
    random_pairs,
    reloaded,
    text_bag,
    tiny_clip,
    tiny_siglip,
    values,
    vit_encoder,
)

MODELS = {
    "clip": lambda: kcm.ContrastiveModel.from_backbone(
        tiny_clip(), masking=kcm.ClusterMasking(patch_size=4, seed=0)
    ),
    "siglip": lambda: kcm.ContrastiveModel.from_backbone(tiny_siglip()),
    "own": lambda: kcm.ContrastiveModel(
        functional_vit(), text_bag(width=8), projection_dim=5
    ),
    "encoders": lambda: make_model(
        lambda: vit_encoder(num_layers=2),
        lambda: bert(num_layers=2),
        head="mlp",
        image_blocks=2,
        text_blocks=2,
    ),
}
SIDES = ("image", "text")
each_tower = pytest.mark.parametrize(
    ("kind", "side"), [(kind, side) for kind in MODELS for side in SIDES]
)
# What Keras writes each format with.
CONVERTERS = {
    "onnx": {"tensorflow": "tf2onnx", "torch": "onnxscript"},
    "openvino": {"tensorflow": "openvino", "torch": "openvino"},
    "litert": {"tensorflow": "ai_edge_litert"},
}
ENDINGS = {"onnx": "onnx", "openvino": "xml", "litert": "tflite"}


def tower_of(kind, side):
    """A tower, and inputs for it."""
    model, pairs = MODELS[kind](), random_pairs(4)
    if side == "image":
        return model.image_tower, pairs["images"]
    return model.text_tower, pairs["token_ids"]


@pytest.mark.one_case
@each_tower
def test_a_tower_is_saved_and_reloaded_alone(kind, side, tmp_path):
    tower, inputs = tower_of(kind, side)
    loaded = reloaded(tower, tmp_path)
    assert isinstance(loaded, Tower)
    assert len(loaded.weights) == len(tower.weights)
    assert_same_values(*(x.predict(inputs, verbose=0) for x in (loaded, tower)))
    if side == "image":
        floats = random_images(4)
        assert_same_values(loaded(floats), tower(floats))


def sizes_of(tower, inputs):
    """Batches of different sizes, of shorter texts, too, if the tower takes them."""
    length = keras.tree.flatten(tower.input_specs)[0].shape[1]
    if length is None:
        return [inputs[:1, :4], inputs[:3, :4], inputs]
    if isinstance(tower, TextTower):
        inputs = np.pad(inputs, ((0, 0), (0, length - inputs.shape[1])))
    return [inputs[:1], inputs]


def prepared(tower, inputs):
    """NumPy arrays of all inputs of a text encoder; images as they are."""
    if isinstance(tower, ImageTower):
        return inputs
    return keras.tree.map_structure(np.array, tower.prepare(inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "side"),
    [(kind, side) for kind in ("clip", "siglip", "encoders") for side in SIDES],
)
def test_an_exported_tower_takes_inputs_of_any_size(kind, side, tmp_path):
    tower, inputs = tower_of(kind, side)
    assert inputs.dtype == ("uint8" if side == "image" else "int32")
    given, kwargs = sizes_of(tower, inputs), {}
    if keras.backend.backend() == "torch" and (kind, side) == ("siglip", "image"):
        # keras_hub's pooling head repeats its probe by a number that torch cannot
        # leave open, so this one tower is exported for a batch size.
        signature = [keras.InputSpec(shape=inputs.shape, dtype="uint8")]
        given, kwargs = [inputs], dict(input_signature=signature)
    embed = exported(tower, tmp_path, **kwargs)
    for x in given:
        found = embed(prepared(tower, x))
        assert_close(found, tower.predict(x, verbose=0), 1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def run_file(path, inputs):
    """What a runtime computes with a file from a dictionary of inputs."""

    def named(name):
        # Some formats put a prefix before it.
        return next(value for key, value in inputs.items() if key in name)

    if path.endswith(".onnx"):
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        names = [x.name for x in session.get_inputs()]
        return session.run(None, {name: named(name) for name in names})[0]
    if path.endswith(".xml"):
        # Its default is bfloat16 on a CPU that has it.
        options = "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        program = pytest.importorskip("openvino").compile_model(path, *options)
        return program([named(" ".join(x.names)) for x in program.inputs])[0]
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(path)
    given = interpreter.get_input_details()
    for x in given:
        interpreter.resize_tensor_input(x["index"], named(x["name"]).shape)
    interpreter.allocate_tensors()
    for x in given:
        interpreter.set_tensor(x["index"], named(x["name"]))
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["clip", "encoders"])
@pytest.mark.parametrize(("format", "ending"), ENDINGS.items())
def test_a_tower_runs_in_the_runtime_of_a_format(format, ending, kind, side, tmp_path):
    backend = keras.backend.backend()
    if backend not in CONVERTERS[format]:
        pytest.skip("The table of formats has no cell for this backend.")
    pytest.importorskip(CONVERTERS[format][backend])
    tower, inputs = tower_of(kind, side)
    signature = None
    if format == "litert":
        # Without a length, TensorFlow would write operations that it lacks.
        signature = keras.tree.map_structure(
            lambda x: keras.InputSpec(x.dtype, (None, *inputs.shape[1:]), name=x.name),
            [tower.input_specs],
        )
    path = str(tmp_path / f"tower.{ending}")
    tower.export(path, format, False, signature)
    for x in sizes_of(tower, inputs) if signature is None else [inputs]:
        given = prepared(tower, x)
        given = given if isinstance(given, dict) else {"": given}
        assert_close(run_file(path, given), tower.predict(x, verbose=0), 1e-5)


@pytest.mark.slow
def test_onnx_computes_in_float32_where_the_model_does_not(tmp_path):
    backend = keras.backend.backend()
    if backend not in CONVERTERS["onnx"]:
        pytest.skip("The table of formats has no cell for this backend.")
    pytest.importorskip(CONVERTERS["onnx"][backend])
    mixed, single = (
        kcm.ContrastiveModel.from_backbone(tiny_clip(dtype=x)).image_tower
        for x in ("mixed_bfloat16", "float32")
    )
    single.set_weights(mixed.get_weights())
    images, path = random_pairs(4)["images"], str(tmp_path / "tower.onnx")
    rounded = mixed.predict(images, verbose=0)
    mixed.export(path, "onnx", False)
    expected = single.predict(images, verbose=0)
    assert_close(run_file(path, {"images": images}), expected, 1e-5)
    assert_same_values(mixed.predict(images, verbose=0), rounded)
    assert abs(rounded - expected).max() > 1e-4


@pytest.mark.any_backend
def test_a_format_names_the_package_that_is_missing(tmp_path, monkeypatch):
    tower, _ = tower_of("own", "image")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = ONNX_PACKAGES[keras.backend.backend()]
    with pytest.raises(ImportError, match=rf"needs {package}.*pip install.*Received:"):
        tower.export(str(tmp_path / "tower.onnx"), "onnx")


def test_onnx_names_the_backends_that_write_it(tmp_path, monkeypatch):
    backend = keras.backend.backend()
    monkeypatch.delitem(ONNX_PACKAGES, backend, raising=False)
    tower, _ = tower_of("own", "image")
    message = (
        f"needs the backend torch or TensorFlow.*Save the model.*Received:.*{backend}"
    )
    with pytest.raises(ValueError, match=message):
        tower.export(str(tmp_path / "tower.onnx"), "onnx")


@pytest.mark.slow
def test_a_signature_exports_an_image_tower_for_normalized_floats(tmp_path):
    tower, images = MODELS["own"]().image_tower, random_images(4)
    signature = [keras.InputSpec(shape=(None, 16, 16, 3), dtype="float32")]
    embed = exported(tower, tmp_path, input_signature=signature)
    assert_close(embed(images), tower(images), 1e-5)


def test_mixed_precision_reaches_the_encoder_unrounded():
    # The encoder is float32, whatever the policy is when its tower is made.
    model = MODELS["own"]()
    images = -8.0 + 0.001 * random_images(4)
    keras.config.set_dtype_policy("mixed_bfloat16")
    tower = model.image_tower
    assert_same_values(tower(images), model.encode_image(images))


@pytest.mark.any_backend
def test_a_masking_does_not_keep_the_encoder_of_its_model():
    masking = kcm.RandomMasking(0.5)
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(), masking=masking)
    block = weakref.ref(model.backbone.vision_encoder.encoder_layers[0])
    del model
    gc.collect()
    assert block() is None


@pytest.mark.any_backend
def test_a_tower_of_texts_says_how_many_tokens_it_takes():
    tower = MODELS["clip"]().text_tower
    with pytest.raises(ValueError, match=r"at most 6 .* truncate .*Received: 7 tokens"):
        tower(np.ones((2, 7), "int32"))


@pytest.mark.any_backend
def test_an_encoder_of_unknown_inputs_is_an_error():
    class Own(keras.Model):
        def call(self, images):
            return ops.mean(images, axis=(1, 2))

    model = kcm.ContrastiveModel(Own(), text_bag(width=3))
    with pytest.raises(ValueError, match=r"functional.*Received:"):
        model.image_tower.export("tower")


@pytest.mark.any_backend
def test_inputs_for_export_are_named_as_the_entries_of_a_batch():
    ids, mask = (keras.Input((6,), dtype="int32", name=name) for name in "ab")
    both = {"token_ids": ids, "padding_mask": mask}
    encoder = keras.Model(both, keras.layers.Concatenate()([ids, mask]))
    model = kcm.ContrastiveModel(functional_vit(), encoder, projection_dim=5)
    assert {*model.text_tower.input_specs} == {*both}
    assert {*model.input_specs} == {"images", *both}


def vit_with_dropout(masked, rate):
    """A vision transformer with dropout, and with a masking of its own or around it."""
    masking = kcm.RandomMasking(num_prefix_tokens=0, seed=1)
    dropout = keras.layers.Dropout(rate)
    if masked == "inside":
        return functional_vit(mix=lambda x: dropout(masking(x)))
    encoder = functional_vit(mix=dropout)
    if masked in ("around", "between"):
        encoder = kcm.with_masking(encoder, masking, "positions")
    if masked == "around":
        return encoder
    # Dropout after the encoder with the masking, too.
    images = keras.Input((16, 16, 3))
    return keras.Model(images, keras.layers.Dropout(rate)(encoder(images)))


@pytest.mark.parametrize("masked", [None, "around", "between", "inside"])
def test_frozen_encoders_train_with_masking_alone(masked):
    losses, weights = {}, []
    for rate in (0.5, 0.0):
        images, texts = vit_with_dropout(masked, rate), text_bag()
        texts = keras.Model(texts.input, keras.layers.Dropout(rate)(texts.output))
        model = kcm.ContrastiveModel(images, texts, projection_dim=5)
        weights = weights or values(model.trainable_weights)
        for weight, value in zip(model.trainable_weights, weights, strict=True):
            weight.assign(value)
        for is_trained in (False, True):
            images.trainable = texts.trainable = is_trained
            model.compile(keras.optimizers.SGD(1e-9), **FAST)
            fit = dict(batch_size=8, epochs=3, shuffle=False, verbose=0)
            history = model.fit(random_pairs(8), **fit).history["loss"]
            losses[rate, is_trained] = history
    if masked in (None, "around"):
        # A frozen encoder of another kind trains, so that its masking does.
        np.testing.assert_allclose(losses[0.5, False], losses[0.0, False], rtol=1e-5)
    assert (np.ptp(losses[0.0, False]) > 1e-3) == (masked is not None)
    assert np.ptp(losses[0.5, True]) > 1e-3
