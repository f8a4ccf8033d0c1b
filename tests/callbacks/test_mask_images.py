"""Images of masks in TensorBoard."""

import builtins
import io

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.callbacks import MaskImages
from tests.helpers import (
    CONTEXT,
    FAST,
    VOCABULARY,
    HideByNoise,
    functional_vit,
    patch_mlp,
    random_pairs,
    text_bag,
    tiny_siglip,
)

from .training_run import weights_of

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
)


def make_model(masking, encoder=patch_mlp, layer="positions"):
    keras.utils.set_random_seed(1)
    if masking is None:
        image_encoder = encoder()
    else:
        image_encoder = kcm.with_masking(encoder(), masking, layer)
    # The masking of texts is no masking of images to draw.
    texts = kcm.with_text_masking(tiny_siglip().text_encoder, kcm.RandomMasking(0.5))
    model = kcm.ContrastiveModel(image_encoder, texts)
    model.compile(keras.optimizers.Adam(0.1), **FAST)
    return model


def fit(model, callbacks, epochs=1):
    pairs = random_pairs(8)
    return model.fit(
        pairs,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


def written_images(folder):
    """Pairs of an epoch and what was written at its end, as arrays."""
    events = accumulators.EventAccumulator(
        str(folder / "masks"), size_guidance={"images": 0}
    )
    events.Reload()
    assert events.Tags()["images"] == ["masks"]
    found = []
    for event in events.Images("masks"):
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert image.size == (event.width, event.height)
        found.append((event.step, np.asarray(image.convert("RGB"))))
    return found


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB"))


def moving_threshold():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 4, 1.0)
    return kcm.ClusterMasking(
        4,
        min_mask_ratio=0.25,
        threshold=0.0,
        embedding_weight=schedule,
        hide_padding=False,
        anchor_ratio=0.2,
        seed=1,
    )


def test_images_show_the_masking_at_the_end_of_the_epoch(tmp_path):
    model, images = make_model(moving_threshold()), random_pairs(6)["images"]
    fit(model, [MaskImages(images, tmp_path, max_images=2, seed=4)], epochs=4)
    found = written_images(tmp_path)
    assert [epoch for epoch, _ in found] == [0, 1, 2, 3]
    encoder = model.image_encoder
    figure = kcm.visualization.plot_masks(
        images[:2], encoder.masking, seed=4, embed=encoder.embed_patches
    )
    np.testing.assert_array_equal(found[-1][1], drawn(figure))
    # The threshold and the mix have moved.
    assert np.any(found[0][1] != found[-1][1])


@pytest.mark.any_backend
def test_images_of_an_unchanged_masking_are_equal(tmp_path):
    model = make_model(kcm.ClusterMasking(4))
    fit(model, [MaskImages(random_pairs(2)["images"], tmp_path)], epochs=2)
    (_, first), (_, second) = written_images(tmp_path)
    np.testing.assert_array_equal(first, second)


@pytest.mark.any_backend
@pytest.mark.parametrize("masking", [kcm.RandomMasking, kcm.BlockMasking, HideByNoise])
def test_maskings_without_a_patch_size_are_drawn(tmp_path, masking):
    model = make_model(masking(0.5, num_prefix_tokens=0))
    images = random_pairs(2)["images"]
    fit(model, [MaskImages({"images": images}, tmp_path)])
    ((_, image),) = written_images(tmp_path)
    figure = kcm.visualization.plot_masks(images, model.maskings[0], patch_size=4)
    np.testing.assert_array_equal(image, drawn(figure))


@pytest.mark.any_backend
def test_a_prefix_is_taken_from_the_encoder(tmp_path):
    backbone = kcm.models.clip_backbone("tiny", 16, VOCABULARY, CONTEXT, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))
    model.compile("sgd", **FAST)
    fit(model, [MaskImages(random_pairs(2)["images"], tmp_path)], epochs=1)
    assert len(written_images(tmp_path)) == 1


def test_a_backbone_and_normalized_images_are_drawn(tmp_path):
    backbone = kcm.models.clip_backbone("tiny", 16, VOCABULARY, CONTEXT, 4)
    masking = kcm.ClusterMasking(4, embedding_weight=0.5)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    model.compile("sgd", **FAST)
    images = random_pairs(2)["images"]
    normalized = ops.convert_to_numpy(masking.prepare_pixels(images))
    for name, given in (("whole", images), ("floats", normalized)):
        fit(model, [MaskImages(given, tmp_path / name)], epochs=1)
        ((_, image),) = written_images(tmp_path / name)
        figure = kcm.visualization.plot_masks(
            images, masking, embed=model.image_encoder.embed_patches
        )
        np.testing.assert_array_equal(image, drawn(figure))


@pytest.mark.any_backend
def test_the_first_the_last_and_each_so_many_epochs_are_drawn(tmp_path):
    model = make_model(kcm.RandomMasking(0.5, num_prefix_tokens=0))
    fit(model, [MaskImages(random_pairs(2)["images"], tmp_path, every=2)], epochs=5)
    assert [epoch for epoch, _ in written_images(tmp_path)] == [0, 1, 3, 4]


def test_training_is_bit_for_bit_the_same(tmp_path):
    def trained(callbacks):
        model = make_model(moving_threshold(), functional_vit)
        fit(model, callbacks, epochs=2)
        return weights_of(model)

    expected = trained([])
    found = trained([MaskImages(random_pairs(2)["images"], tmp_path)])
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.any_backend
def test_another_process_writes_nothing(tmp_path, monkeypatch):
    module = "keras_cluster_mask.callbacks.mask_images.is_main_process"
    monkeypatch.setattr(module, lambda: False)
    model = make_model(kcm.ClusterMasking(4))
    fit(model, [MaskImages(random_pairs(2)["images"], tmp_path)])
    assert not [*tmp_path.iterdir()]


# === Wrong input ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every`.*Received: every=0"),
        ({"max_images": 0}, "`max_images`.*Received: max_images=0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskImages(random_pairs(2)["images"], "logs", **options)


@pytest.mark.any_backend
def test_a_model_without_a_masking_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"with a masking.*Received: model="):
        fit(make_model(None), [MaskImages(random_pairs(2)["images"], tmp_path)])


@pytest.mark.any_backend
def test_images_of_another_size_and_none_are_refused_before_training(tmp_path):
    model = make_model(kcm.ClusterMasking(4))
    for images, message in (
        (np.zeros((1, 18, 16, 3), "uint8"), "`images` must be known and divisible"),
        (np.zeros((0, 16, 16, 3), "uint8"), "at least one image"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*Received: "):
            fit(model, [MaskImages(images, tmp_path)])
    assert int(model.optimizer.iterations) == 0


@pytest.mark.any_backend
def test_a_masking_whose_patches_are_not_known_is_refused(tmp_path):
    images = keras.Input((16, 16, 3))
    x = keras.layers.Reshape((16, 8))(keras.layers.Conv2D(8, 4, strides=4)(images))
    x = kcm.RandomMasking(0.5, num_prefix_tokens=0)(x)
    x = keras.layers.Dense(16)(keras.layers.GlobalAveragePooling1D()(x))
    model = kcm.ContrastiveModel(keras.Model(images, x), text_bag())
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"`kcm.with_masking`.*Received: masking="):
        fit(model, [MaskImages(random_pairs(2)["images"], tmp_path)])


@pytest.mark.any_backend
def test_another_model_than_a_contrastive_one_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    masks = MaskImages(random_pairs(2)["images"], tmp_path)
    with pytest.raises(ValueError, match=r"`MaskImages` works.*Received: a Sequential"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[masks])


@pytest.mark.any_backend
def test_what_to_install_is_said(monkeypatch):
    whole = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        MaskImages(random_pairs(2)["images"], "logs")
