"""ContrastiveModel: its loss, its training, what it saves and what it refuses."""

import functools
import itertools
import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.towers import normalize_pixels
from keras_cluster_mask.models import ContrastiveHead
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    class_pairs,
    compiled_model,
    image_mlp,
    masked_vit,
    model_with_log,
    moving_weight,
    random_images,
    random_pairs,
    reloaded,
    small_model,
    stream,
    text_bag,
    tiny_clip,
    to_numpy,
    value_and_gradients,
    values,
)
from tests.test_losses import hits_of, reference

METRICS = {"loss", "accuracy", "temperature"}


def masked_model(masking, **kwargs):
    return kcm.ContrastiveModel(masked_vit(masking), text_bag(), **kwargs)


def threshold_masking(**kwargs):
    options = dict(mask_ratio=0.5, min_mask_ratio=0.25, threshold=0.05, seed=3)
    return kcm.ClusterMasking(patch_size=4, **{**options, **kwargs})


def one_step(model, pairs, **kwargs):
    return model.fit(
        pairs, batch_size=len(pairs["images"]), shuffle=False, verbose=0, **kwargs
    ).history


@pytest.fixture(scope="module")
def fitted():
    """A model that was fitted, compiled, with a masking; its pairs and history."""
    keras.utils.set_random_seed(0)
    model = masked_model(kcm.ClusterMasking(patch_size=4, mask_ratio=0.25, seed=1))
    model.compile(optimizer=keras.optimizers.Adam(0.02))
    pairs = class_pairs(16)
    history = model.fit(
        pairs, batch_size=8, epochs=30, verbose=0, validation_data=pairs
    ).history
    return model, pairs, history


# === Embeddings ===


@pytest.mark.slow_to_compile
def test_a_ragged_last_batch_is_predicted_and_a_batch_of_one_is_evaluated(fitted):
    model, _, _ = fitted
    assert np.isfinite(model.evaluate(random_pairs(1), verbose=0)).all()
    pairs = random_pairs(5)
    whole = model(pairs)
    for batch_size in (2, 5):
        found = model.predict(pairs, batch_size=batch_size, verbose=0)
        assert {x.dtype for x in found.values()} == {np.dtype("float32")}
        assert_close(found, whole, 1e-5)


# === The loss ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("duplicates", "given"), [("positive", None), ("positive", 0.5), ("negative", None)]
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_of_a_step_is_the_one_written_out(kind, duplicates, given):
    model = compiled_model(
        keras.optimizers.SGD(0.1),
        head=ContrastiveHead(kind, initial_temperature=given),
        duplicates=duplicates,
    )
    # Texts that are equal, which are positives of one another unless told otherwise.
    pairs = {**random_pairs(6), "token_ids": class_pairs(6, 2)["token_ids"]}
    labels = np.arange(6) % 2 if duplicates == "positive" else None
    pair = [to_numpy(value) for value in model(pairs).values()]
    temperature = given or {"softmax": 0.07, "sigmoid": 0.1}[kind]
    expected = reference(kind, pair, 1 / temperature, -10.0, labels)
    of_texts, of_images = hits_of(pair, labels).mean(axis=1)
    evaluated = model.evaluate(pairs, batch_size=6, verbose=0, return_dict=True)
    for logs in (evaluated, one_step(model, pairs)):
        assert np.squeeze(logs["loss"]) == pytest.approx(expected, rel=1e-4)
        assert np.squeeze(logs["temperature"]) == pytest.approx(temperature, rel=1e-5)
        accuracy = float(np.squeeze(logs["accuracy"]))
        if duplicates == "positive":
            assert accuracy == pytest.approx((of_texts + of_images) / 2)
        else:
            # Rounding decides which of equal texts is the most similar to an image.
            assert of_images / 2 <= accuracy + 1e-6
            assert accuracy <= (1 + of_images) / 2 + 1e-6
    if kind == "sigmoid":
        assert float(model.head.logit_bias) != -10.0


# === The temperature ===


def test_the_scale_is_clipped_and_passes_gradients():
    model = small_model(head=ContrastiveHead(max_logit_scale=20.0))
    model.head.logit_scale.assign(math.log(50.0))
    scale, (gradient,) = value_and_gradients(
        lambda: (model.head.scale, model.head.scale), [model.head.logit_scale]
    )
    assert float(scale) == pytest.approx(20.0, rel=1e-5)
    assert float(gradient) == pytest.approx(20.0, rel=1e-5)
    model.head.logit_scale.assign(math.log(10.0))
    assert float(model.head.scale) == pytest.approx(10.0, rel=1e-5)


def test_an_update_never_leaves_the_weight_above_its_limit():
    head = ContrastiveHead(max_logit_scale=20.0, initial_temperature=1 / 19.9)
    model = compiled_model(keras.optimizers.SGD(0.01), head=head)
    # Learned pairs ask for an ever higher scale.
    model.head.logit_scale.assign(5.0)
    one_step(model, random_pairs(4))
    assert float(model.head.logit_scale) <= math.log(20.0) + 1e-6


# === Training ===


def test_training_learns_which_text_belongs_to_which_image(fitted):
    _, _, history = fitted
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    # Both directions are right, or their mean would be below.
    assert history["val_accuracy"][-1] >= 0.95


def test_fit_reports_exactly_the_promised_metrics(fitted):
    model, pairs, history = fitted
    names = METRICS | {"mask_ratio"}
    assert set(history) == names | {f"val_{name}" for name in METRICS}
    assert {len(value) for value in history.values()} == {30}
    evaluated = model.evaluate(pairs, batch_size=8, verbose=0, return_dict=True)
    # Evaluation masks nothing.
    assert set(evaluated) == METRICS
    assert len(model.test_on_batch(pairs)) == len(METRICS)
    assert history["val_loss"][-1] == pytest.approx(evaluated["loss"], rel=1e-4)
    # The budget keeps 12 of 16 patches.
    assert history["mask_ratio"] == pytest.approx([1 - 12 / 16] * 30)


def test_a_tower_that_is_frozen_between_fits_stays_as_it_is():
    model = small_model()
    model.compile("sgd")
    one_step(model, random_pairs(4))
    model.image_encoder.trainable = False
    if keras.backend.backend() == "jax":
        # Keras compares the lengths of lists.
        with pytest.raises(ValueError, match=r"`optimizer` must be new.*Received: "):
            one_step(model, random_pairs(4))
        model.compile("sgd")
    before = values(model.image_encoder.weights)
    one_step(model, random_pairs(4))
    assert_same_values(model.image_encoder.weights, before)


@pytest.mark.any_backend
def test_several_optimizers_are_new_after_a_tower_is_frozen():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    model.compile(kcm.optimizer_by_block(model, 1e-3, steps=9))
    pairs = random_pairs(4)
    one_step(model, pairs)
    model.image_encoder.trainable = False
    with pytest.raises(ValueError, match=r"`optimizer` must be new.*Received: "):
        one_step(model, pairs)


@pytest.mark.parametrize("options", [{}, {"use_ema": True}])
def test_an_optimizer_that_was_built_for_other_weights_is_refused_by_name(options):
    model = small_model()
    model.image_encoder.trainable = bool(options)
    model.compile(keras.optimizers.SGD(**options))
    one_step(model, random_pairs(4))
    model.image_encoder.trainable = not options
    with pytest.raises(ValueError, match=r"`optimizer` must be new.*Received: "):
        one_step(model, random_pairs(4))


@pytest.mark.slow_to_compile
@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        ("mask_ratio", 0.75, (4, 16)),
        ("micro_batch_size", 2, (2, 16)),
        ("duplicates", "negative", (4, 16)),
    ],
)
def test_options_count_from_the_next_fit(name, value, shape):
    seen = []

    class Seen(kcm.RandomMasking):
        def score(self, noise, images=None, tokens=None):
            seen.append(tuple(noise.shape))
            return super().score(noise, images, tokens)

    masking = Seen(0.5, num_prefix_tokens=0)
    model = masked_model(masking, loss="sigmoid")
    model.compile(keras.optimizers.SGD(1e-9))
    pairs = random_pairs(4)
    pairs["token_ids"][1] = pairs["token_ids"][0]
    owner = masking if name == "mask_ratio" else model
    old = getattr(owner, name)
    before = one_step(model, pairs, validation_data=pairs)
    seen.clear()
    setattr(owner, name, value)
    after = one_step(model, pairs, validation_data=pairs)
    assert {*seen} == {shape}
    assert after["mask_ratio"] == [0.75 if name == "mask_ratio" else 0.5]
    for key in ("loss", "val_loss"):
        if name == "duplicates":
            assert abs(after[key][0] - before[key][0]) > 1
    back = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch and setattr(owner, name, old)
    )
    one_step(model, pairs, epochs=2, callbacks=[back])
    seen.clear()
    one_step(model, pairs)
    assert {*seen} == {(4, 16)}


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("number", [0, 1])
def test_options_of_two_maskings_of_one_name_are_told_apart(number):
    maskings = [
        kcm.RandomMasking(0.5, num_prefix_tokens=0, name="masking") for _ in range(2)
    ]
    images, tokens = keras.Input((16, 16, 3)), keras.Input((16, 48))
    inner = keras.Model(tokens, maskings[0](tokens, images=None, training=True))
    x = inner(keras.layers.Reshape((16, 48))(images))
    x = maskings[1](x, images=None, training=True)
    encoder = keras.Model(images, keras.layers.GlobalAveragePooling1D()(x))
    model = kcm.ContrastiveModel(encoder, text_bag(), projection_dim=4)
    model.compile("sgd")
    assert one_step(model, random_pairs(4))["mask_ratio"] == [0.75]
    model.maskings[number].mask_ratio = 0.25
    assert one_step(model, random_pairs(4))["mask_ratio"] == [0.625]


def test_a_masking_trains_under_full_compilation():
    # Compiling takes torch minutes.
    jit_compile = "auto" if keras.backend.backend() == "torch" else True
    model = masked_model(threshold_masking())
    model.compile(optimizer="sgd", jit_compile=jit_compile)
    history = one_step(model, random_pairs(8), epochs=2)
    assert np.isfinite(history["loss"]).all()
    assert min(history["mask_ratio"]) >= 0.25


@pytest.mark.slow
def test_compiled_and_eager_steps_fit_to_the_same_weights(monkeypatch, tmp_path):
    if keras.backend.backend() == "torch":
        import torch

        # What torch traces is compiled to nothing else, which would take minutes.
        compile_nothing = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", compile_nothing)
    results = []
    for options in ({"run_eagerly": True}, {"jit_compile": True}):
        keras.utils.set_random_seed(0)
        model = small_model()
        # An optimizer with moments, whose steps are not those of rounding errors.
        model.compile(keras.optimizers.Adam(0.01, epsilon=1e-3), **options)
        checkpoint = kcm.callbacks.Checkpoint(tmp_path / str(len(results)))
        one_step(model, random_pairs(4), epochs=2, callbacks=[checkpoint])
        results.append(values(model.trainable_variables))
    assert_close(*results, 1e-5)


@pytest.mark.any_backend
def test_a_sequential_encoder_is_one_whose_inputs_are_known():
    image_encoder, text_encoder = (
        keras.Sequential([encoder.input, *encoder.layers[1:]])
        for encoder in (image_mlp(), text_bag())
    )
    model = kcm.ContrastiveModel(
        image_encoder, text_encoder, projection_dim=4, head="mlp"
    )
    assert model.built
    image_encoder.trainable = False
    assert not model.image_encoder.trainable_weights
    model.compile("sgd")
    assert np.isfinite(one_step(model, random_pairs(4))["loss"]).all()


@pytest.mark.one_case
@pytest.mark.parametrize(
    "options", [{}, {"projection_dim": 16, "head": "mlp"}], ids=["plain", "mlp"]
)
def test_encoders_that_learn_their_widths_when_called_train(options):
    images = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(8)])
    texts = keras.Sequential(
        [keras.layers.Embedding(30, 8), keras.layers.GlobalAveragePooling1D()]
    )
    model = kcm.ContrastiveModel(images, texts, **options)
    model.compile("sgd")
    pairs = random_pairs(4)
    assert np.isfinite(one_step(model, pairs, epochs=3)["loss"]).all()
    width = 16 if options else 8
    assert model.predict(pairs, verbose=0)["image_embeddings"].shape == (4, width)
    assert len(images.weights) == 2


def test_a_dataset_of_unknown_length_counts_the_steps_that_it_has():
    tf = pytest.importorskip("tensorflow")
    pairs = random_pairs(8)
    known = tf.data.Dataset.from_tensor_slices(pairs).batch(4, drop_remainder=True)
    found = []
    for dataset in (known, known.filter(lambda batch: True)):
        keras.utils.set_random_seed(0)
        weight = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)
        masking = kcm.ClusterMasking(patch_size=4, embedding_weight=weight, seed=1)
        model = masked_model(masking)
        # Not FAST: compiled, TensorFlow finds the end within a step.
        model.compile(keras.optimizers.SGD(0.1))
        history = model.fit(dataset, epochs=2, verbose=0).history
        assert int(model.optimizer.iterations) == int(masking.step) == 4
        found.append(history["loss"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_clip_trains_on_texts_of_a_length_that_is_not_known():
    tf = pytest.importorskip("tensorflow")
    pairs = random_pairs(4)
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    shapes = {"images": (16, 16, 3), "token_ids": (None,)}
    dataset = dataset.padded_batch(4, shapes, drop_remainder=True)
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    model.compile("sgd", **FAST)
    expected = model.evaluate(pairs, batch_size=4, verbose=0, return_dict=True)
    found = model.fit(dataset, verbose=0).history
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.one_case
def test_fit_sees_each_batch_of_a_stream_once_and_in_order(write_pairs):
    shard = write_pairs("a.tar", 0, 14)
    data = stream(shard, include_keys=True)
    model, log = model_with_log(steps=16)
    model.compile("sgd", **FAST)
    # Nine batches, three, and two; 14 batches are four epochs.
    model.fit(data, epochs=3, verbose=0)
    assert data.start == 9
    # What is read otherwise is no part of the training.
    next(iter(data))
    model.fit(data, verbose=0)
    model.fit(data, steps_per_epoch=1, epochs=2, verbose=0)
    assert data.start == 14
    seen = log.seen_tokens()
    batches = itertools.islice(stream(shard), 14)
    assert_same_values(seen, [b["token_ids"][:, 0] for b in batches])
    for epoch in seen.reshape(4, 14):
        assert sorted(epoch) == [*range(14)]


def test_the_end_of_an_epoch_is_no_reason_to_warn_unless_steps_are_missing(write_pairs):
    shard = write_pairs("a.tar", 0, 10)
    held_out = stream(shard, training=False)
    model = compiled_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Your input ran out of data")
        warnings.filterwarnings("error", "`shuffle=True` was passed")
        model.fit(stream(shard), epochs=2, verbose=0)
        model.evaluate(held_out, verbose=0)
        model.predict(held_out, verbose=0)
    pairs = ((random_pairs(4),) for _ in range(2))
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(pairs, steps_per_epoch=3, verbose=0)


@pytest.mark.any_backend
def test_an_endless_stream_is_not_evaluated_or_predicted(write_pairs, monkeypatch):
    def read(dataset):
        raise AssertionError("it would be read without end")

    endless = stream(write_pairs("a.tar", 0, 10))
    monkeypatch.setattr(kcm.data.ImageTextDataset, "__iter__", read)
    for call in (compiled_model().evaluate, compiled_model().predict):
        with pytest.raises(ValueError, match=r"training=False.*Received:"):
            call(endless)


# === An unset threshold ===


@pytest.mark.any_backend
def test_training_without_a_threshold_is_an_error_and_after_adapt_it_trains():
    model = masked_model(threshold_masking(threshold=None))
    model.compile("sgd", **FAST)
    pairs = random_pairs(8)
    before = values(model.weights)
    with pytest.raises(ValueError, match=r"threshold of .* is not set.*Received:"):
        one_step(model, pairs)
    assert_same_values(before, model.weights)
    # A step outside of `fit` does not wait for the value, and ends in NaN.
    assert np.isnan(to_numpy(model(pairs, training=True)["image_embeddings"])).all()
    model.maskings[0].adapt(pairs["images"])
    assert np.isfinite(one_step(model, pairs)["loss"]).all()


@pytest.mark.any_backend
def test_adapt_takes_a_model_whose_encoder_calls_the_masking_itself():
    masking = threshold_masking(threshold=None, num_prefix_tokens=0)
    images = keras.Input((16, 16, 3))
    patches = keras.layers.Conv2D(16, 4, 4)(images)
    tokens = masking(keras.layers.Reshape((16, 16))(patches), images=images)
    pooled = keras.layers.GlobalAveragePooling1D()(tokens)
    model = kcm.ContrastiveModel(keras.Model(images, pooled), text_bag())
    masking.adapt(random_pairs(8)["images"], model=model)
    assert np.isfinite(masking.threshold)


@pytest.mark.any_backend
def test_adapt_sees_pixels_as_the_model_shows_them_to_the_masking():
    # Channels of different deviations, which CLIP's statistics weigh differently.
    images = random_pairs(64)["images"] // np.array([1, 3, 9], "uint8")
    normalized = normalize_pixels(images)
    thresholds = []
    for given, inside in ((images, True), (normalized, True), (images, False)):
        masking = threshold_masking(threshold=None, mask_ratio=0.5)
        model = masked_model(masking)
        masking.adapt(given, model=model if inside else None)
        thresholds.append(float(masking.threshold))
    assert thresholds[0] == thresholds[1] != thresholds[2]


@pytest.mark.slow_to_compile
def test_only_training_steps_move_the_threshold_and_count_steps():
    masking = threshold_masking(threshold=0.07, embedding_weight=moving_weight())
    model = masked_model(masking)
    model.compile("sgd", **FAST)
    pairs = random_pairs(4)
    state = masking.step, masking.threshold

    def read():
        return [float(variable) for variable in state]

    before = read()
    model.encode_image(pairs["images"], training=True)
    model.evaluate(pairs, verbose=0)
    model.predict(pairs, verbose=0)
    assert read() == before
    model.fit(pairs, batch_size=4, epochs=2, verbose=0)
    assert read()[0] == 2
    assert read()[1] != before[1]
    # In a training loop of one's own, also of the encoder alone.
    model(pairs, training=True)
    model.image_encoder(random_images(4), training=True)
    assert read()[0] == 4


def test_a_loss_without_the_models_own_counts_steps_and_logs_what_it_updates():
    class Distance(kcm.ContrastiveModel):
        def __init__(self, *args):
            super().__init__(*args)
            self.half = keras.metrics.Mean(name="half")

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            self.half.update_state(0.5)
            images, texts = y_pred["image_embeddings"], y_pred["text_embeddings"]
            return self.head.scale * ops.mean(ops.square(images - texts))

    masking = threshold_masking(threshold=0.07, embedding_weight=moving_weight())
    model = Distance(masked_vit(masking), text_bag())
    model.compile("sgd", **FAST)
    pairs = random_pairs(8)
    fit = dict(batch_size=4, epochs=2, verbose=0, validation_data=pairs)
    logs = model.fit(pairs, **fit).history
    names = {"loss", "half"}
    assert logs.keys() == names | {f"val_{name}" for name in names}
    assert logs["half"] == [0.5, 0.5]
    assert int(masking.step) == 4
    assert float(masking.threshold) != pytest.approx(0.07)


# === Refusals ===


@pytest.mark.any_backend
def test_a_mask_ratio_that_is_set_later_is_checked():
    model = masked_model(kcm.RandomMasking(0.5, num_prefix_tokens=0))
    model.compile("sgd", **FAST)
    model.masking.mask_ratio = 1.5
    with pytest.raises(ValueError, match=r"`mask_ratio` must.*Received: "):
        one_step(model, random_pairs(4))


def of_towers(**options):
    model = small_model()
    return kcm.ContrastiveModel(model.image_tower, model.text_tower, **options)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "match"),
    [
        *(
            (lambda x=options: small_model(head=ContrastiveHead(**x)), f"`{name}`")
            for name, options in (
                ("loss", dict(loss="hinge")),
                ("initial_temperature", dict(initial_temperature=0.0)),
                ("max_logit_scale", dict(initial_temperature=0.002)),
                ("initial_logit_bias", dict(initial_logit_bias=-5.0)),
                ("initial_logit_bias", dict(loss="sigmoid", initial_logit_bias=np.nan)),
            )
        ),
        *(
            (functools.partial(small_model, **options), f"`{name}`")
            for name, options in (
                ("head", dict(head="cubic")),
                ("projection_dim", dict(head="mlp")),
                ("projection_dim", dict(projection_dim=0)),
            )
        ),
        (lambda: kcm.ContrastiveModel(image_mlp(12), text_bag()), "projection_dim"),
        (lambda: of_towers(projection_dim=5), "`projection_dim` must be omitted"),
        (lambda: of_towers(pixel_mean=None), "`pixel_mean` must be omitted"),
        (
            lambda: kcm.ContrastiveModel(small_model().image_tower, text_bag()),
            "both encoders must be towers",
        ),
        (lambda: kcm.ContrastiveModel("vit", text_bag()), "`image_encoder`"),
    ],
)
def test_what_makes_no_model_is_refused_by_name(make, match):
    with pytest.raises(ValueError, match=rf"{match}.*Received: "):
        make()


@pytest.mark.any_backend
def test_labels_losses_metrics_and_no_optimizer_are_refused():
    model, pairs = compiled_model(), random_pairs(4)
    remedy = r"'token_ids'.*`image_text_dataset` of \[{'image': path"
    for name, call in (
        (f"`y` .*{remedy}", lambda: model.fit(["a.png"], ["a caption"])),
        (f"`y` .*{remedy}", lambda: model.evaluate(pairs, np.arange(4))),
        ("`class_weight`", lambda: model.fit(pairs, class_weight={0: 2.0})),
        ("`optimizer`", model.compile),
        ("`loss`", lambda: model.compile("sgd", loss="mse")),
        ("`metrics`", lambda: model.compile("sgd", metrics=["mse"])),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*Received:"):
            call()


# === Weights of pairs ===


@pytest.mark.one_case
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_weights_of_pairs_weight_loss_and_accuracy(micro_batch_size):
    pairs = random_pairs(8)
    weight = np.array([0, 2, 1, 0.5, 0, 1, 1, 3], "float32")
    model = compiled_model(keras.optimizers.SGD(0.0), micro_batch_size=micro_batch_size)
    pair = [*model.predict(pairs, verbose=0).values()]
    expected = {
        # A pair of weight 0 is still among the others' negatives.
        "loss": reference("softmax", pair, 1 / 0.07, weight=weight / 8),
        "accuracy": hits_of(pair).mean(axis=0) @ weight / 8.5,
    }
    given = {**pairs, "sample_weight": weight}
    found = [
        one_step(model, given),
        model.evaluate(pairs, sample_weight=weight, verbose=0, return_dict=True),
        model.test_on_batch(pairs, sample_weight=weight, return_dict=True),
        {
            name.removeprefix("val_"): value
            for name, value in one_step(
                model, pairs, validation_data=(pairs, None, weight)
            ).items()
            if name.startswith("val_")
        },
    ]
    for logs in found:
        for name, value in expected.items():
            assert np.squeeze(logs[name]) == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.one_case
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_batch_of_weights_of_0_has_a_loss_of_0_and_changes_nothing(loss):
    model = compiled_model(keras.optimizers.SGD(1.0), loss=loss)
    before = values(model.trainable_variables)
    logs = one_step(model, {**random_pairs(4), "sample_weight": np.zeros(4)})
    assert logs["loss"] == logs["accuracy"] == [0.0]
    assert_same_values(model.trainable_variables, before)


# === Loss scaling ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("mixed_float16", {"auto_scale_loss": False}, "SGD"),
        ("mixed_float16", {}, "LossScaleOptimizer"),
        ("mixed_bfloat16", {}, "SGD"),
    ],
)
def test_a_tower_in_float16_gets_a_scaled_loss(policy, options, expected, tmp_path):
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(policy))
    model.compile("sgd", **options)
    for each in (model, reloaded(model, tmp_path)):
        assert type(each.optimizer).__name__ == expected


@pytest.mark.any_backend
def test_the_projections_have_the_dtype_policy_of_the_model(tmp_path):
    model = small_model(projection_dim=4, dtype="mixed_bfloat16")
    loaded, pairs = reloaded(model, tmp_path), random_pairs(4)
    for each in (model, loaded):
        assert each.image_tower.projection.compute_dtype == "bfloat16"
    found, expected = (x.predict(pairs, verbose=0) for x in (loaded, model))
    assert_same_values(found, expected)
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}


@pytest.mark.any_backend
def test_the_lowest_temperature_may_be_the_initial_one():
    for limit in (49, 100, 103, 197):
        small_model(
            head=ContrastiveHead(initial_temperature=1 / limit, max_logit_scale=limit)
        )


@pytest.mark.any_backend
def test_a_low_limit_of_the_scale_is_kept():
    head = small_model(head=ContrastiveHead(max_logit_scale=5)).head
    assert head.max_logit_scale == 5
    assert float(head.scale) == pytest.approx(5)
