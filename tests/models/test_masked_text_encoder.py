"""with_text_masking: the same text encoder, on fewer tokens at their old positions."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models import with_context_length
from tests.helpers import (
    FAST,
    HideByNoise,
    functional_vit,
    random_noise,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    value_and_gradients,
    values,
)

LENGTH, KEPT = 12, 6
BACKBONES = {"clip": tiny_clip, "metaclip": tiny_metaclip, "siglip": tiny_siglip}
# The ids of the start token, of the end token and of padding.
SPECIAL = {"clip": (28, 29, 0), "metaclip": (0, 2, 1), "siglip": (None, 1, 1)}
each_family = pytest.mark.parametrize("family", list(BACKBONES))
each_order = pytest.mark.parametrize("padding_first", [True, False])


@functools.cache
def backbone_of(family):
    return with_context_length(BACKBONES[family](), LENGTH)


def make(family, masking=None, **kwargs):
    masking = masking or kcm.RandomMasking(0.5, seed=1)
    return kcm.with_text_masking(backbone_of(family).text_encoder, masking, **kwargs)


def model_of(family, mask_ratio=0.5, **kwargs):
    text_masking = kcm.RandomMasking(mask_ratio, seed=1)
    return kcm.ContrastiveModel.from_backbone(
        backbone_of(family), text_masking=text_masking, **kwargs
    )


def texts(family, count=8, lengths=range(3, LENGTH + 1), seed=0):
    """Texts of several lengths, special tokens included, padded to the full length."""
    start, end, padding = SPECIAL[family]
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 28, (count, LENGTH)).astype("int32")
    for row, length in enumerate(np.resize([*lengths], count)):
        if start is not None:
            ids[row, 0] = start
        ids[row, length - 1] = end
        ids[row, length:] = padding
    return ids


def pooled_places(family, ids):
    if family == "siglip":
        return np.full(len(ids), ids.shape[1] - 1)
    return np.argmax(ids == SPECIAL[family][1], axis=1)


# === References in NumPy ===


def keep(score, noise, count):
    order = np.lexsort((-noise, -score), axis=-1)
    return np.sort(order[:, :count], axis=-1)


def expected_scores(family, ids, noise, padding_first):
    """FLIP's two text maskings, and infinite for tokens that always stay."""
    start, _, padding = SPECIAL[family]
    score = noise - 2.0 * (ids == padding) if padding_first else noise.copy()
    score[np.arange(len(ids)), pooled_places(family, ids)] = np.inf
    if start is not None:
        score[:, 0] = np.inf
    return score


def gap_at_cut(score, count):
    lowest_kept, highest_left = -np.sort(-score, axis=1)[:, count - 1 : count + 1].T
    return lowest_kept - highest_left


def run_by_hand(encoder, ids, kept):
    """The blocks of an encoder, on the rows of kept tokens."""
    tokens = to_numpy(encoder.embedding(ids))
    x = ops.convert_to_tensor(np.take_along_axis(tokens, kept[:, :, None], axis=1))
    for block in encoder.encoder_layers:
        x = block(x)
    if hasattr(encoder, "head"):
        return to_numpy(encoder.head(encoder.post_layer_norm(x)[:, -1]))
    return to_numpy(encoder.layer_norm(x))


# === The same encoder ===


@each_family
def test_inference_returns_exactly_what_the_encoder_returns(family):
    masked, ids = make(family), texts(family)
    expected = to_numpy(masked.encoder({"token_ids": ids}))
    np.testing.assert_array_equal(to_numpy(masked({"token_ids": ids})), expected)
    np.testing.assert_array_equal(
        to_numpy(masked({"token_ids": ids}, training=False)), expected
    )


@each_order
@each_family
def test_training_runs_the_blocks_on_the_tokens_that_flip_keeps(family, padding_first):
    masked = make(family, padding_first=padding_first)
    ids, noise = texts(family, 200), random_noise(200, LENGTH)
    score = expected_scores(family, ids, noise, padding_first)
    is_clear = gap_at_cut(score, KEPT) > 2.0**-11
    assert is_clear.sum() > 190
    kept = keep(score, noise, KEPT)

    found = to_numpy(masked({"token_ids": ids}, training=True, noise=noise))
    expected = run_by_hand(masked.encoder, ids, kept)
    if family != "siglip":
        stays = np.zeros((200, LENGTH), bool)
        np.put_along_axis(stays, kept, True, axis=1)
        assert found.shape == (200, LENGTH, 16)
        assert not found[is_clear][~stays[is_clear]].any()
        found = np.take_along_axis(found, kept[:, :, None], axis=1)
    np.testing.assert_allclose(found[is_clear], expected[is_clear], atol=1e-5)


@each_order
@pytest.mark.parametrize("family", ["clip", "metaclip"])
def test_start_and_pooled_token_stay_in_every_text(family, padding_first):
    masked, ids = make(family, padding_first=padding_first), texts(family, 500)
    found = to_numpy(masked({"token_ids": ids}, training=True))
    stays = np.any(found != 0, axis=-1)
    assert (stays.sum(axis=1) == KEPT).all()
    assert stays[:, 0].all()
    assert stays[np.arange(500), pooled_places(family, ids)].all()
    # No other place does.
    assert (stays.mean(axis=0)[1:] < 0.9).all()


@pytest.mark.any_backend
def test_the_first_word_of_a_siglip_text_may_leave():
    first, last = [], []
    for place, changed in ((0, first), (-1, last)):
        masked = make("siglip")
        ids = texts("siglip", 100, lengths=[LENGTH])
        noise = random_noise(100, LENGTH)
        other = ids.copy()
        other[:, place] = 28
        one, two = (
            to_numpy(masked({"token_ids": x}, training=True, noise=noise))
            for x in (ids, other)
        )
        changed.extend(np.any(one != two, axis=1))
    assert 0.3 < np.mean(first) < 0.6
    assert np.all(last)


@pytest.mark.parametrize("family", ["clip", "metaclip"])
def test_a_text_that_fits_is_embedded_as_without_a_masking(family):
    model = model_of(family)
    ids = texts(family, lengths=range(3, KEPT + 1))
    for training in (False, True):
        np.testing.assert_allclose(
            to_numpy(model.encode_text(ids, training=training)),
            to_numpy(model.without_masking().encode_text(ids)),
            atol=1e-6,
        )
    longer = texts(family, lengths=range(KEPT + 1, LENGTH + 1))
    one, other = (
        to_numpy(model.encode_text(longer, training=x)) for x in (True, False)
    )
    assert (np.abs(one - other).max(axis=1) > 1e-4).all()


@pytest.mark.any_backend
def test_a_word_with_the_id_of_padding_is_a_word():
    # In CLIP's vocabulary, which pads with 0, this is an exclamation mark.
    model, ids = model_of("clip"), texts("clip", 4, lengths=[KEPT])
    ids[:, 1 : KEPT - 1] = 0
    np.testing.assert_allclose(
        to_numpy(model.encode_text(ids, training=True)),
        to_numpy(model.encode_text(ids)),
        atol=1e-6,
    )


@pytest.mark.any_backend
def test_shorter_texts_keep_the_same_share():
    masked, ids = make("clip"), texts("clip", lengths=[5, 8])[:, :8]
    found = to_numpy(masked({"token_ids": ids}, training=True))
    assert (np.any(found != 0, axis=-1).sum(axis=1) == 4).all()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="other backends know all lengths"
)
@each_family
def test_texts_of_unknown_length_are_masked_if_the_encoder_knows_it(family):
    import tensorflow as tf

    encoder = make(family)
    ids, noise = texts(family), random_noise(8, LENGTH)

    @tf.function(input_signature=[tf.TensorSpec((None, None), "int32")])
    def call(ids):
        return encoder(ids, training=True, noise=noise)

    if family == "siglip":
        expected = encoder(ids, training=True, noise=noise)
        np.testing.assert_allclose(call(tf.constant(ids)), expected, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"`token_ids`.*`context_length`.*Rec"):
            call(tf.constant(ids))


@pytest.mark.any_backend
def test_a_pooling_of_your_own_finds_its_token():
    model = model_of("clip", mask_ratio=0.25)
    ids = keras.Input((LENGTH,), dtype="int32")
    tokens = model.text_encoder({"token_ids": ids})
    pooled = keras.Model(ids, model.backbone.text_pooler(tokens, ids))
    rows = texts("clip", lengths=range(3, 10))
    np.testing.assert_allclose(
        to_numpy(model.head.project_text(pooled(rows, training=True))),
        to_numpy(model.text_features(rows)),
        atol=1e-5,
    )


def test_gradients_reach_the_tokens_that_stay_and_no_others():
    masked, ids, noise = make("clip"), texts("clip", 1, [LENGTH]), random_noise(1, 12)
    kept = keep(expected_scores("clip", ids, noise, True), noise, KEPT)[0]
    positions = masked.encoder.embedding.position_embedding.position_embeddings

    def loss():
        tokens = masked({"token_ids": ids}, training=True, noise=noise)
        # The sum of a normalized token is constant.
        return ops.sum(tokens[:, -1, :3]), tokens

    _, (found,) = value_and_gradients(loss, [positions])
    assert np.flatnonzero(np.any(found != 0, axis=1)).tolist() == kept.tolist()


@pytest.mark.any_backend
def test_weights_are_the_encoders_own_and_not_held_twice():
    masked = make("clip")
    own = {id(v) for v in masked.encoder.weights}
    state = {id(v) for v in masked.masking.weights}
    assert len(masked.weights) == len({id(v) for v in masked.weights})
    assert {id(v) for v in masked.weights} == own | state


def test_the_noise_changes_from_step_to_step_and_follows_the_seed():
    ids = {"token_ids": texts("siglip", lengths=[LENGTH])}
    first, second = make("siglip"), make("siglip")
    one, two = (to_numpy(first(ids, training=True)) for _ in range(2))
    assert np.abs(one - two).max() > 1e-4
    np.testing.assert_array_equal(one, to_numpy(second(ids, training=True)))


@each_order
def test_saved_and_reloaded_it_masks_the_same_way(padding_first, tmp_path):
    masked, ids = make("clip", padding_first=padding_first), texts("clip")
    masked({"token_ids": ids}, training=True)  # moves the seed
    masked.save(tmp_path / "masked.keras")
    loaded = keras.saving.load_model(tmp_path / "masked.keras")
    for training in (False, True):
        np.testing.assert_array_equal(
            to_numpy(loaded({"token_ids": ids}, training=training)),
            to_numpy(masked({"token_ids": ids}, training=training)),
        )


@pytest.mark.any_backend
def test_a_strategy_of_your_own_chooses_among_words():
    class First(kcm.PatchMasking):
        """Keeps the first words; the rest not at all, if it can be helped."""

        def score(self, noise, images=None, tokens=None):
            place = ops.arange(noise.shape[1], dtype="float32")
            return ops.where(place < 4, 0.0 * noise - place, -np.inf)

    masked, ids = make("clip", First(0.5)), texts("clip", 4, lengths=[LENGTH])
    found = to_numpy(masked({"token_ids": ids}, training=True))
    stays = np.any(found != 0, axis=-1)
    assert stays[:, [0, 1, 2, 3, LENGTH - 1]].all()
    assert (stays.sum(axis=1) == KEPT).all()


# === In a model ===


def test_the_mask_ratio_of_a_model_is_that_of_its_images():
    for masking, expected in ((kcm.RandomMasking(0.75), [0.75]), (None, None)):
        model = model_of("clip", masking=masking)
        model.compile("sgd", **FAST)
        pairs = {**random_pairs(4), "token_ids": texts("clip", 4)}
        history = model.fit(
            pairs, batch_size=4, validation_data=pairs, verbose=0
        ).history
        assert history.get("mask_ratio") == expected
        assert "val_mask_ratio" not in history


def test_a_model_of_two_encoders_trains_on_parts_of_texts():
    model = kcm.ContrastiveModel(
        functional_vit(), make("siglip"), loss="sigmoid", initial_temperature=0.1
    )
    pairs = {**random_pairs(8), "token_ids": texts("siglip")}
    before = values(model.text_encoder.encoder.weights)
    model.compile(keras.optimizers.SGD(0.1), **FAST)
    model.fit(pairs, batch_size=8, verbose=0)
    after = values(model.text_encoder.encoder.weights)
    assert any(np.any(one != other) for one, other in zip(before, after))
    whole = model.without_masking()
    assert not whole.maskings
    assert whole.text_encoder is model.text_encoder.encoder
    ids = pairs["token_ids"]
    np.testing.assert_array_equal(
        model.text_tower.predict(ids, verbose=0),
        whole.text_tower.predict(ids, verbose=0),
    )
    assert {id(v) for v in model.text_tower.weights} == {
        id(v) for v in whole.text_encoder.weights
    }


@pytest.mark.any_backend
@each_order
def test_a_reloaded_model_leaves_out_the_same_tokens(padding_first, tmp_path):
    model, ids = model_of("clip", padding_first=padding_first), texts("clip")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    one, other = (to_numpy(x.encode_text(ids, training=True)) for x in (model, loaded))
    np.testing.assert_array_equal(one, other)
    assert (np.abs(one - to_numpy(model.encode_text(ids)))[:3].max() > 1e-4) != (
        padding_first
    )


@pytest.mark.any_backend
def test_models_that_normalize_pixels_otherwise_may_share_a_masking_of_texts():
    masking = kcm.RandomMasking(0.5)
    for family in ("clip", "siglip"):
        model = kcm.ContrastiveModel.from_backbone(
            backbone_of(family), text_masking=masking
        )
        assert model.maskings == [masking]


@pytest.mark.any_backend
def test_a_masking_serves_images_or_texts_but_not_both():
    masking = kcm.RandomMasking(0.5)
    with pytest.raises(ValueError, match=r"masking of its own.*Received: random_mask"):
        kcm.ContrastiveModel.from_backbone(
            backbone_of("clip"), masking, text_masking=masking
        )


@pytest.mark.any_backend
def test_a_model_without_one_says_nothing_of_it_in_its_checkpoints():
    # Checkpoints from before there were text maskings do not, and can be resumed.
    unmasked = kcm.ContrastiveModel.from_backbone(backbone_of("clip"))
    texts_options = {"text_masking", "padding_first"}
    assert not texts_options & unmasked.get_config().keys()
    assert texts_options <= model_of("clip").get_config().keys()


# === Errors ===


@pytest.mark.any_backend
def test_the_order_of_padding_needs_a_masking_of_texts():
    with pytest.raises(ValueError, match=r"pass `text_masking`.*Received: padding_fi"):
        kcm.ContrastiveModel.from_backbone(backbone_of("clip"), padding_first=False)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (lambda: kcm.ClusterMasking(4), "reads images"),
        (lambda: kcm.BlockMasking(0.5), "needs the grid of an image"),
        (lambda: kcm.GridMasking(), "needs the grid of an image"),
        (lambda: kcm.RandomMasking(0.5, num_prefix_tokens=1), "num_prefix_tokens=1"),
        (lambda: HideByNoise(0.5), "hides tokens behind a Keras mask"),
        (lambda: kcm.data.RandomTextMasking(), "`PatchMasking` layer.*RandomText"),
        (lambda: kcm.RandomMasking(0.8), r"at least 3 tokens.*Received:.*2 of 12"),
    ],
)
def test_a_masking_that_cannot_mask_texts_is_refused(masking, message):
    # As the model's `masking` is of images.
    message = rf"`masking`, or `text_masking` of a model, must.*{message}"
    with pytest.raises(ValueError, match=message):
        make("clip", masking())


@pytest.mark.any_backend
def test_an_encoder_whose_pooled_token_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"CLIPTextEncoder.*Received: .*Functional"):
        kcm.with_text_masking(text_bag(), kcm.RandomMasking(0.5))


@pytest.mark.any_backend
def test_texts_that_are_too_short_or_of_unknown_length_are_refused():
    masked, ids = make("clip"), texts("clip", lengths=[4])[:, :4]
    with pytest.raises(ValueError, match=r"at least 3 tokens.*keeps 2 of 4"):
        masked({"token_ids": ids}, training=True)
    with pytest.raises(ValueError, match=r"`token_ids` must have.*Received:"):
        masked.num_kept(None)
