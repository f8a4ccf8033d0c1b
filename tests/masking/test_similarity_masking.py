"""What all strategies share that compare patches."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking import similarity_masking
from tests.masking.images import (
    as_images,
    assert_selects,
    compiled_select,
    draw_noise,
    dtype_of,
    numpy,
    photographs,
    textured,
)
from tests.masking.test_cluster_masking import ROWS, tokens_of

STRATEGIES = {
    "cluster": kcm.ClusterMasking,
    "threshold": functools.partial(
        kcm.ClusterMasking, min_mask_ratio=0.3, threshold=0.14
    ),
    "kmeans": kcm.KMeansMasking,
    "edge": kcm.EdgeMasking,
}
BUDGET = [name for name in STRATEGIES if name != "threshold"]


def ramp(steps=4):
    return keras.optimizers.schedules.PolynomialDecay(0.0, steps, 1.0)


# === Images ===


@pytest.mark.parametrize("strategy", BUDGET)
def test_images_may_be_of_any_dtype_alike(strategy):
    values = np.random.default_rng(29).integers(0, 256, (ROWS, 32, 48, 3)) / 255.0
    integers = as_images(values, "uint8")
    noise = draw_noise(np.random.default_rng(30), ROWS, 24)
    masking = STRATEGIES[strategy](8)
    expected = numpy(*masking.select(images=integers, noise=noise))
    for dtype in ("int32", "float32", "float16", "bfloat16"):
        # Integers up to 255 are exact in all of these.
        images = ops.cast(integers, dtype)
        assert_selects(masking, expected, images=images, noise=noise)


@pytest.mark.parametrize("strategy", BUDGET)
def test_the_scale_and_origin_of_pixels_do_not_matter(strategy):
    noise = draw_noise(np.random.default_rng(33), ROWS, 24)
    images = photographs(32, 48, ROWS).astype("float32")
    select = compiled_select(STRATEGIES[strategy](8))
    expected = numpy(select(images=images, noise=noise)[0])
    for changed in (images / 255.0, (images - 127.5) / 127.5, 300.0 - images):
        indices = numpy(select(images=changed.astype("float32"), noise=noise)[0])
        # Rounding may decide where a decision is close.
        assert np.mean((indices == expected).all(axis=1)) > 0.9


@pytest.mark.parametrize("strategy", BUDGET)
def test_data_format_changes_the_layout_only(strategy):
    rng = np.random.default_rng(31)
    images = textured(rng, ROWS, 32, 48, 3, "uint8")
    noise = draw_noise(rng, ROWS, 24)
    last = STRATEGIES[strategy](8, data_format="channels_last")
    first = STRATEGIES[strategy](8, data_format="channels_first")
    expected = numpy(*last.select(images=images, noise=noise))
    moved = np.moveaxis(images, -1, 1)
    assert_selects(first, expected, images=moved, noise=noise)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_large_batch_is_compared_in_blocks_with_the_same_result(
    strategy, views, monkeypatch
):
    rng = np.random.default_rng(35)
    images = textured(rng, 7, 32, 48, 3)
    noise = rng.random((7, views, 24), dtype="float32")
    masking = STRATEGIES[strategy](8, embedding_weight=0.3, num_prefix_tokens=1)
    inputs = {"images": images, "noise": noise, "tokens": tokens_of(7, 25)}
    expected = numpy(*masking.select(**inputs))
    score, sizes = masking.score, []

    def watched(noise, images, tokens):
        sizes.append((noise.shape[0], images.shape[0], tokens.shape[0]))
        return score(noise, images, tokens)

    masking.score = watched
    monkeypatch.setattr(similarity_masking, "MAX_VALUES", 3 * 32 * 48 * 3 + 1)
    for found, other in zip(numpy(*masking.select(**inputs)), expected, strict=True):
        np.testing.assert_array_equal(found, other)
    # Compiled code has a plan of its own for memory.
    blocks = [(3, 3, 3), (3, 3, 3), (1, 1, 1)]
    on_torch = keras.backend.backend() == "torch"
    assert sizes == views * (blocks if on_torch else [(7, 7, 7)])


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BUDGET)
def test_data_format_defaults_to_the_configured_one(strategy):
    before = keras.config.image_data_format()
    try:
        keras.config.set_image_data_format("channels_first")
        assert STRATEGIES[strategy](8).data_format == "channels_first"
    finally:
        keras.config.set_image_data_format(before)
    assert STRATEGIES[strategy](8).data_format == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_a_batch_do_not_influence_one_another(strategy):
    rng = np.random.default_rng(32)
    images = photographs(32, 48, ROWS)
    noise = draw_noise(rng, ROWS, 24)
    half = ROWS // 2
    others = np.concatenate([photographs(32, 48, ROWS + half)[ROWS:], images[:half]])
    other_noise = np.concatenate([draw_noise(rng, half, 24), noise[:half]])
    masking = STRATEGIES[strategy](8)
    alone = numpy(*masking.select(images=images, noise=noise))
    moved = numpy(*masking.select(images=others, noise=other_noise))
    for before, after in zip(alone, moved):
        np.testing.assert_array_equal(after[half:], before[:half])


# === The mix of pixels and tokens ===


@pytest.mark.parametrize("strategy", BUDGET)
def test_a_schedule_sets_the_weight_of_each_training_step(strategy):
    rng = np.random.default_rng(24)
    images = textured(rng, ROWS, 32, 48, 3)
    tokens = tokens_of(ROWS, 1 + 24, dim=32)
    noise = draw_noise(rng, ROWS, 24)
    scheduled = STRATEGIES[strategy](8, embedding_weight=ramp())
    chosen = []
    for step in range(6):
        fixed = STRATEGIES[strategy](8, embedding_weight=min(step / 4, 1.0))
        expected = numpy(*fixed.select(images, tokens, noise))
        inputs = dict(images=images, tokens=tokens, noise=noise)
        assert_selects(scheduled, expected, **inputs)
        chosen.append(expected[0])
        # Neither inference nor looking advances the step, only training.
        scheduled(tokens, images=images)
        assert int(numpy(scheduled.step)) == step
        scheduled(tokens, images=images, training=True, noise=noise)
    assert np.any(chosen[0] != chosen[4])


@pytest.mark.parametrize("strategy", BUDGET)
def test_step_advances_in_a_compiled_training_step(strategy):
    masking = STRATEGIES[strategy](8, embedding_weight=ramp())
    inputs = keras.Input((25, 6)), keras.Input((32, 48, 3))
    tokens = keras.layers.Dense(6)(inputs[0])
    kept = masking(tokens, images=inputs[1], training=True)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(kept))
    model.compile("sgd", "mse")
    data = [tokens_of(ROWS, 25), photographs(32, 48, ROWS).astype("float32")]
    for _ in range(3):
        model.train_on_batch(data, np.zeros((ROWS, 6), "float32"))
    assert int(numpy(masking.step.value)) == 3


@pytest.mark.parametrize("strategy", BUDGET)
def test_masks_do_not_depend_on_the_dtype_policy(strategy):
    noise = draw_noise(np.random.default_rng(21), ROWS, 24)
    pixels = photographs(32, 48, ROWS).astype("float32") / 255
    tokens = tokens_of(ROWS, 25)
    plain, mixed = (
        STRATEGIES[strategy](8, embedding_weight=0.5, dtype=policy)
        for policy in ("float32", "mixed_bfloat16")
    )
    expected = numpy(*plain.select(pixels, tokens, noise))
    for masking in (plain, mixed):
        kept = masking(tokens, images=pixels, training=True, noise=noise)
        assert dtype_of(kept) == "float32"
        np.testing.assert_array_equal(numpy(kept)[:, 0], tokens[:, 0])
        patches = np.take_along_axis(tokens[:, 1:], expected[0][:, :, None], axis=1)
        np.testing.assert_array_equal(numpy(kept)[:, 1:], patches)


@pytest.mark.parametrize("strategy", BUDGET)
def test_gradients_reach_kept_tokens_alone(strategy):
    images, tokens = photographs(32, 48, ROWS), tokens_of(ROWS, 25)
    noise = draw_noise(np.random.default_rng(22), ROWS, 24)
    masking = STRATEGIES[strategy](8, embedding_weight=0.5)
    indices, _ = numpy(*masking.select(images, tokens, noise))
    source = keras.Variable(tokens)

    class Sum(keras.Model):
        def __init__(self):
            super().__init__()
            self.masking, self.source = masking, source

        def call(self, inputs, training=None):
            images, noise = inputs
            tokens = ops.convert_to_tensor(self.source)
            return self.masking(tokens, images, training=training, noise=noise)

    model = Sum()
    model.compile(
        keras.optimizers.SGD(1.0), loss=lambda _, kept: ops.mean(ops.sum(kept, 1))
    )
    model.train_on_batch([images, noise], np.zeros((ROWS, 13, 6), "float32"))
    moved = numpy(source.value) != tokens
    expected = np.zeros((ROWS, 25), bool)
    expected[:, 0] = True
    np.put_along_axis(expected, 1 + indices, True, axis=1)
    np.testing.assert_array_equal(moved.all(axis=-1), expected)
    np.testing.assert_array_equal(moved.any(axis=-1), expected)


# === Configuration and errors ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("cluster", {"anchor_ratio": 0.1, "softness": 0.4}),
        ("cluster", {"min_mask_ratio": 0.3, "hide_padding": False}),
        ("cluster", {"embedding_weight": 0.25}),
        ("kmeans", {"num_clusters": 3, "iterations": 2}),
        ("edge", {"seed_ratio": 0.2, "threshold": 0.3}),
        ("edge", {"edges": None, "transport": False}),
        *((name, {"embedding_weight": ramp()}) for name in BUDGET),
    ],
)
def test_config_round_trip_keeps_every_argument(strategy, extra):
    options = {
        "patch_size": (8, 4),
        "mask_ratio": 0.6,
        "num_prefix_tokens": 2,
        "data_format": "channels_first",
        "seed": 7,
        "name": "mask",
        **extra,
    }
    masking = STRATEGIES[strategy](**options, dtype="mixed_bfloat16")
    config = masking.get_config()
    for key, value in options.items():
        if key != "embedding_weight":
            assert config[key] == value
    for revived in (
        type(masking).from_config(config),
        keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(masking)
        ),
    ):
        assert type(revived) is type(masking)
        assert revived.get_config() == config
        assert revived.dtype_policy.name == "mixed_bfloat16"
        assert type(revived.embedding_weight) is type(masking.embedding_weight)


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BUDGET)
class TestErrors:
    tokens = tokens_of(2, 1 + 16)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask_ratio": 1.0}, "`mask_ratio` must be in"),
            ({"embedding_weight": 1.1}, "`embedding_weight` must be in"),
            ({"embedding_weight": "linear"}, "`embedding_weight` must be in"),
            ({"data_format": "NHWC"}, "`data_format` must be"),
            ({"patch_size": 0}, "`patch_size` must be"),
            ({"patch_size": (8, 8, 8)}, "`patch_size` must be"),
            ({"patch_size": (8, -8)}, "`patch_size` must be"),
            ({"patch_size": 8.0}, "`patch_size` must be"),
            ({"patch_size": "8"}, "`patch_size` must be"),
            ({"patch_size": None}, "`patch_size` must be"),
        ],
    )
    def test_of_arguments_name_them_and_what_was_received(
        self, strategy, options, message
    ):
        with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
            STRATEGIES[strategy](**{"patch_size": 8, **options})

    @pytest.mark.parametrize(
        ("shape", "data_format", "message"),
        [
            ((2, 30, 32, 3), "channels_last", "The height .*height=30"),
            ((2, 32, 30, 3), "channels_last", "The width .*width=30"),
            ((2, 3, 30, 32), "channels_first", "The height .*height=30"),
            ((2, 3, 32, 30), "channels_first", "The width .*width=30"),
            ((2, 32, 32), "channels_last", "rank 4"),
            ((2, 1, 32, 32, 3), "channels_last", "rank 4"),
        ],
    )
    def test_of_images_say_which_side_does_not_fit(
        self, strategy, shape, data_format, message
    ):
        masking = STRATEGIES[strategy](8, data_format=data_format)
        with pytest.raises(ValueError, match=rf"(?s){message}") as error:
            masking(self.tokens, images=np.zeros(shape, "uint8"), training=True)
        assert "Received: " in str(error.value)

    def test_of_missing_images_name_the_layer(self, strategy):
        masking = STRATEGIES[strategy](8, name="my_masking")
        message = r"`my_masking` needs the images[\s\S]*Received: images=None"
        with pytest.raises(ValueError, match=message):
            masking(self.tokens, training=True)
        with pytest.raises(ValueError, match=message):
            masking.select()

    def test_of_a_mix_without_tokens_say_so(self, strategy):
        masking = STRATEGIES[strategy](8, embedding_weight=0.5)
        with pytest.raises(ValueError, match=r"`tokens` must be[\s\S]*Received: "):
            masking.select(images=photographs(32, 48, ROWS))
