"""Several masked views of each image in a step."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    MASKINGS,
    assert_close,
    assert_same_values,
    masked_vit,
    random_images,
    random_noise,
    random_pairs,
    text_bag,
    to_numpy,
    vit_encoder,
)
from tests.models.test_contrastive_model import own_masking
from tests.test_losses import reference

BATCH, N = 6, 16


def views_model(views, masking=kcm.RandomMasking, **options):
    keras.utils.set_random_seed(0)
    encoder = masked_vit(masking(num_prefix_tokens=0, seed=1))
    return kcm.ContrastiveModel(encoder, text_bag(), views=views, **options)


def noise_of_step(masking, views):
    """The noise of the next step of a masking of the same seed."""
    return ops.reshape(masking.draw(BATCH * views, N), (BATCH, views, N))


# === The layer ===


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", [x for x in MASKINGS if x != "attentive"])
def test_each_view_is_masked_as_by_its_noise_alone(strategy):
    masking = MASKINGS[strategy](num_prefix_tokens=1)
    images = random_images(BATCH)
    tokens = np.random.default_rng(1).normal(size=(BATCH, 1 + N, 8)).astype("float32")
    noise = random_noise(3 * BATCH).reshape(BATCH, 3, N)
    together = masking.select(images, tokens, noise)
    kept = masking(tokens, images=images, training=True, noise=noise)
    assert kept.shape[0] == BATCH * 3
    kept = ops.reshape(kept, (BATCH, 3, *kept.shape[1:]))
    ratios = []
    for view in range(3):
        # A step moves the state of a masking, so each view has a masking of its own.
        other = MASKINGS[strategy](num_prefix_tokens=1)
        alone = other.select(images, tokens, noise[:, view])
        for found, expected in zip(together, alone):
            assert_same_values(found[:, view], expected)
        expected = other(tokens, images=images, training=True, noise=noise[:, view])
        assert_same_values(kept[:, view], expected)
        ratios.append(float(other.last_mask_ratio))
    assert float(masking.last_mask_ratio) == pytest.approx(np.mean(ratios), rel=1e-6)


@pytest.mark.any_backend
def test_hidden_tokens_are_hidden_in_each_view():
    images = random_images(BATCH)
    masking = kcm.ClusterMasking(4, min_mask_ratio=0.25, threshold=0.1)
    encoder = kcm.with_masking(vit_encoder(), masking)
    noise = random_noise(2 * BATCH).reshape(BATCH, 2, N)
    both = encoder(images, training=True, noise=noise)
    for view in range(2):
        alone = encoder(images, training=True, noise=noise[:, view])
        assert_close(both[view::2], alone, 1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("shape", [(4, 2, N), (BATCH, 2, 9), (BATCH, 0, N)])
def test_noise_of_another_batch_or_grid_is_refused(shape):
    masking = kcm.RandomMasking(num_prefix_tokens=1)
    message = r"`noise` must have shape .*6, views, 16.*Received: noise.shape=\(\d, \d"
    with pytest.raises(ValueError, match=message):
        masking(np.zeros((BATCH, 17, 8)), training=True, noise=np.zeros(shape))


@pytest.mark.any_backend
def test_a_graph_of_views_knows_no_number_of_rows():
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    tokens = keras.Input((1 + N, 8), batch_size=BATCH)
    noise = keras.Input((2, N), batch_size=BATCH)
    kept = masking(tokens, training=True, noise=noise)
    assert kept.shape == (None, None, 8)
    assert masking(tokens, training=True).shape == (BATCH, None, 8)
    model = keras.Model([tokens, noise], kept)
    rng = np.random.default_rng(0)
    inputs = [rng.random(x.shape, dtype="float32") for x in model.inputs]
    assert model(inputs).shape == (2 * BATCH, 1 + N // 2, 8)


# === The model ===


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_is_the_mean_of_that_of_each_view(loss):
    pairs = random_pairs(BATCH)
    model = views_model(3, kcm.RandomMasking, loss=loss)
    model.compile(keras.optimizers.SGD(0.0), **FAST)
    logs = model.train_on_batch(pairs, return_dict=True)
    same = views_model(1, loss=loss)
    noise = noise_of_step(same.maskings[0], 3)
    texts = to_numpy(same.encode_text(pairs["token_ids"]))
    pixels = same.image_tower.prepare(pairs["images"])
    losses, hits = [], []
    for view in range(3):
        features = same.image_encoder(pixels, training=True, noise=noise[:, view])
        images = to_numpy(features)
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        scale = to_numpy(same.head.scale)
        losses.append(reference(loss, (images, texts), scale, -10.0))
        hits.append(np.mean((images @ texts.T).argmax(axis=1) == np.arange(BATCH)))
    assert len(set(losses)) == 3
    assert float(logs["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(logs["image_to_text_accuracy"]) == pytest.approx(np.mean(hits))
    assert float(logs["mask_ratio"]) == pytest.approx(0.5)


@pytest.mark.any_backend
def test_patches_and_texts_are_embedded_once():
    sizes = []

    @keras.saving.register_keras_serializable(package="tests")
    class CountRows(keras.layers.Layer):
        def call(self, x):
            sizes.append((self.name, x.shape[0]))
            return x

    encoder = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(16, 4, strides=4),
            keras.layers.Reshape((N, 16)),
            CountRows(name="patches"),
            CountRows(name="blocks"),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=0)
    masked = kcm.with_masking(encoder, masking, "patches")
    ids = keras.Input((6,), dtype="int32")
    texts = keras.Sequential([ids, CountRows(name="texts"), text_bag()])
    model = kcm.ContrastiveModel(masked, texts, views=2)
    sizes.clear()
    outputs = model(random_pairs(BATCH), training=True)
    assert outputs["image_embeddings"].shape == (BATCH, 2, 16)
    assert outputs["text_embeddings"].shape == (BATCH, 16)
    once = [("patches", BATCH), ("texts", BATCH)]
    assert sorted(sizes) == [("blocks", 2 * BATCH), *once]


@pytest.mark.any_backend
def test_a_masking_within_a_model_of_ones_own_makes_views_too():
    model = kcm.ContrastiveModel(own_masking(), text_bag(), views=2)
    model.compile("sgd", **FAST)
    history = model.fit(random_pairs(BATCH), batch_size=3, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    found = model.encode_image(random_pairs(BATCH)["images"], training=True)
    assert found.shape == (BATCH, 2, 16)


@pytest.mark.any_backend
def test_a_strategy_with_a_draw_of_its_own_draws_each_view_as_an_image():
    drawn, seen = [], []

    class Observed(kcm.RandomMasking):
        def draw(self, batch_size, num_patches):
            drawn.append(np.random.default_rng(0).random((batch_size, num_patches)))
            return ops.convert_to_tensor(drawn[-1].astype("float32"))

        def score(self, noise, images=None, tokens=None):
            seen.append(to_numpy(noise))
            return noise

    model = views_model(2, Observed)
    model.encode_image(random_pairs(BATCH)["images"], training=True)
    assert_close(seen, [drawn[0][::2], drawn[0][1::2]], 0.0, 1e-6)
