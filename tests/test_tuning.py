"""`fine_tune`: what was measured best, in one call that resumes."""

import re
import warnings

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution.backends import print_backend
from tests.encoders.test_pooled import bert
from tests.helpers import (
    assert_same_values,
    dino_encoder,
    letters_as_tokens,
    reloaded,
    tiny_clip,
    tiny_siglip,
    values,
)

pytestmark = pytest.mark.filterwarnings("ignore:The tokenizer is not saved")

PHOTOS = [
    {"image": np.full((20, 20, 3), 5 * index, "uint8"), "caption": f"{index} dogs"}
    for index in range(40)
]
TUNE = {"epochs": 2, "batch_size": 8, "verbose": 0}


def words_as_tokens(texts):
    """A start token, the length and the first letter of a text, an end token."""
    return np.array([[1, 2 + len(x) % 7, 3 + ord(x[0]) % 9, 20] for x in texts])


def connected(**options):
    keras.utils.set_random_seed(0)
    options = {
        "masking": kcm.RandomMasking(0.5, seed=1),
        "head": "mlp",
        "projection_dim": 8,
        "tokenizer": words_as_tokens,
        **options,
    }
    return kcm.ContrastiveModel.from_encoders(
        dino_encoder(), bert(dropout=0.0), **options
    )


class Stop(keras.callbacks.Callback):
    """Ends a program in a training step, as Ctrl-C does."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch, logs=None):
        self.batch -= 1
        if self.batch < 0:
            raise KeyboardInterrupt


def test_projections_train_on_features_and_then_all_weights_on_photographs(tmp_path):
    model = connected()
    layer = model.image_encoder.encoder.layers[-1]
    layer.trainable = False
    before = values(model.image_encoder.weights), values(layer.weights)
    history = kcm.fine_tune(model, PHOTOS, **TUNE, validation_data=PHOTOS[:8])
    stages, ratios = history.history["stage"], history.history["mask_ratio"]
    assert stages == ["projections"] * 30 + ["encoders"] * 2
    assert history.epoch == [*range(32)]
    assert ratios[:30] == [None] * 30
    assert ratios[30:] == pytest.approx([0.5] * 2)
    assert history.history["val_loss"][29] is None
    assert len({len(x) for x in history.history.values()}) == 1
    # What was frozen stays frozen.
    assert not layer.trainable
    assert_same_values(values(layer.weights), before[1])
    assert any(
        map(np.any, np.subtract(values(model.image_encoder.weights)[:1], before[0][:1]))
    )


@pytest.mark.any_backend
def test_without_epochs_only_the_projections_train(tmp_path):
    model = connected()
    encoders = [*model.image_encoder.weights, *model.text_encoder.weights]
    before = values(encoders)
    history = kcm.fine_tune(model, PHOTOS, epochs=0, batch_size=8, verbose=0)
    assert set(history.history["stage"]) == {"projections"}
    assert_same_values(values(encoders), before)
    assert len(model.trainable_weights) > 20
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The optimizer was built")
        loaded = reloaded(model, tmp_path)
    assert not loaded.compiled
    with pytest.raises(ValueError, match=r"`epochs` must be at least 1.*Received: "):
        kcm.fine_tune(model, PHOTOS, epochs=0, batch_size=8, verbose=0)


@pytest.mark.any_backend
def test_trained_projections_are_not_trained_again_also_after_a_reload(tmp_path):
    model = connected()
    kcm.fine_tune(model, PHOTOS, epochs=0, batch_size=8, verbose=0)
    for each in (model, reloaded(model, tmp_path)):
        each.tokenizer = words_as_tokens
        history = kcm.fine_tune(each, PHOTOS, **TUNE)
        assert history.history["stage"] == ["encoders"] * 2


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_a_backbone_has_one_stage_at_a_lower_rate(make):
    model = kcm.ContrastiveModel.from_backbone(
        make(), masking=kcm.RandomMasking(0.5), tokenizer=letters_as_tokens
    )
    history = kcm.fine_tune(model, PHOTOS, **TUNE)
    assert history.history["stage"] == ["encoders"] * 2
    rates = [x.learning_rate for x in model.optimizer.optimizers if x.built]
    assert rates


def killed_in_the_projections(model, folder, monkeypatch):
    fit, calls = kcm.ContrastiveModel.fit, []

    def stopped(self, *args, callbacks=(), **kwargs):
        calls.append(callbacks)
        return fit(self, *args, callbacks=[Stop(15), *callbacks], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kcm.ContrastiveModel, "fit", stopped)
        kcm.fine_tune(model, PHOTOS, **TUNE, folder=folder)


def killed_in_the_encoders(model, folder, monkeypatch):
    kcm.fine_tune(model, PHOTOS, **TUNE, folder=folder, callbacks=[Stop(7)])


def killed_in_the_features(model, folder, monkeypatch):
    def stopped(self, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keras_cluster_mask.encoders.embedder.Embedder.images", stopped)
        kcm.fine_tune(model, PHOTOS, **TUNE, folder=folder)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "kill",
    [killed_in_the_features, killed_in_the_projections, killed_in_the_encoders],
)
def test_a_killed_run_goes_on_where_it_stopped_with_equal_bits(
    kill, tmp_path, monkeypatch
):
    whole = connected()
    expected = kcm.fine_tune(whole, PHOTOS, **TUNE, folder=tmp_path / "whole")
    model, folder = connected(), tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        kill(model, folder, monkeypatch)
    # In the same program, and in another one.
    for each in (model, connected()):
        history = kcm.fine_tune(each, PHOTOS, **TUNE, folder=folder)
        assert history.history == expected.history
        assert_same_values(values(each.weights), values(whole.weights))


@pytest.mark.any_backend
def test_projections_that_were_interrupted_are_trained_again(monkeypatch):
    model = connected()
    with pytest.raises(KeyboardInterrupt):
        killed_in_the_projections(model, None, monkeypatch)
    history = kcm.fine_tune(model, PHOTOS, **TUNE)
    assert history.history["stage"] == ["projections"] * 30 + ["encoders"] * 2


@pytest.mark.any_backend
def test_a_metric_stands_in_the_epoch_that_has_it():
    def watch(epoch, logs):
        if epoch == 1:
            logs["val_dogs"] = 0.5

    callback = keras.callbacks.LambdaCallback(on_epoch_end=watch)
    history = kcm.fine_tune(connected(), PHOTOS, **TUNE, callbacks=[callback]).history
    assert history["val_dogs"] == [None] * 31 + [0.5]
    assert len(history["loss"]) == 32


@pytest.mark.any_backend
def test_other_weights_of_the_encoders_are_replaced_with_a_warning(tmp_path, recwarn):
    model = connected()
    kcm.fine_tune(model, PHOTOS, **TUNE, folder=tmp_path)
    again = connected()
    kcm.fine_tune(again, PHOTOS, **TUNE, folder=tmp_path)
    assert not [x for x in recwarn if "other weights" in str(x.message)]
    other = connected()
    other.image_encoder.trainable_weights[0].assign_add(
        np.ones(other.image_encoder.trainable_weights[0].shape)
    )
    with pytest.warns(UserWarning, match="encoders have other weights"):
        kcm.fine_tune(other, PHOTOS, **TUNE, folder=tmp_path)
    assert_same_values(values(other.weights), values(model.weights))


@pytest.mark.any_backend
def test_a_refused_call_leaves_its_folder_for_the_next(tmp_path):
    model = connected()
    kcm.fine_tune(model, PHOTOS, epochs=0, batch_size=8, verbose=0)
    with pytest.raises(ValueError, match="`epochs` must be at least 1"):
        kcm.fine_tune(model, PHOTOS, **{**TUNE, "epochs": 0}, folder=tmp_path)
    kcm.fine_tune(model, PHOTOS, **TUNE, folder=tmp_path)


@pytest.mark.any_backend
def test_a_folder_at_an_address_is_refused():
    with pytest.raises(ValueError, match=r"`folder` must be a local.*gs://bucket/run"):
        kcm.fine_tune(connected(), PHOTOS, **TUNE, folder="gs://bucket/run")


@pytest.mark.any_backend
def test_the_result_may_keep_a_share_of_the_weights_before(tmp_path):
    tuned = connected()
    kcm.fine_tune(tuned, PHOTOS, epochs=0, batch_size=8, verbose=0)
    before = values(tuned.weights)
    kcm.fine_tune(tuned, PHOTOS, **TUNE)
    average = connected()
    options = {**TUNE, "pretrained_share": 0.25, "folder": tmp_path / "run"}
    for _ in range(2):
        kcm.fine_tune(average, PHOTOS, **options)
        for weight, one, other in zip(average.weights, before, values(tuned.weights)):
            if weight.trainable:
                expected = 0.25 * one + 0.75 * other
                np.testing.assert_allclose(values([weight])[0], expected, atol=1e-6)


@pytest.mark.any_backend
def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path):
    kcm.fine_tune(connected(), PHOTOS, **TUNE, folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"`folder`.*Received: .*epochs: 2 then, 3 now"
    ):
        kcm.fine_tune(connected(), PHOTOS, **{**TUNE, "epochs": 3}, folder=tmp_path)
    other = [{**photo, "caption": "a cat"} for photo in PHOTOS]
    with pytest.raises(ValueError, match=r"Received: .*the "):
        kcm.fine_tune(connected(), other, **TUNE, folder=tmp_path)


@pytest.mark.any_backend
def test_a_run_says_what_it_does_and_when_it_is_finished(tmp_path, capsys):
    photos, options = PHOTOS * 2, {**TUNE, "verbose": 2, "folder": tmp_path}
    print_backend.cache_clear()
    kcm.fine_tune(connected(), photos, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Keras backend: {keras.backend.backend()}"
    for line in (
        "Features: 80 photographs, to train the projections.",
        "Projections: 30 x 2 steps.",
        r"Projections: about \d+ (s|min) left\.",
        "Encoders: 2 x 10 steps.",
        r"Encoders: about \d+ (s|min) left\.",
    ):
        assert sum(re.fullmatch(line, x) is not None for x in lines) == 1
    kcm.fine_tune(connected(), photos, **options)
    printed = capsys.readouterr().out
    assert "Encoders: already finished." in printed
    assert " left." not in printed
