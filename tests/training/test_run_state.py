"""What of a saved run a new one takes over, and what must be equal."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.callbacks.training_run import make_dataset, make_model
from tests.helpers import (
    FAST,
    MASKINGS,
    assert_close,
    assert_same_values,
    compiled_model,
    random_pairs,
    small_model,
    values,
)


def fit_epochs(
    folder, epochs, optimizer, callbacks=(), micro_batch_size=None, **options
):
    """Trains to the end of an epoch, from a checkpoint if there is one."""
    keras.utils.set_random_seed(0)
    model = small_model(micro_batch_size=micro_batch_size)
    model.compile(optimizer, **FAST, **options)
    model.fit(
        random_pairs(8),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        resume_from=folder,
        callbacks=[*callbacks, kcm.callbacks.Checkpoint(folder)],
    )
    return model


def decay(steps):
    return keras.optimizers.schedules.CosineDecay(0.01, steps)


# === The options of compile ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"learning_rate": 0.1}),
        ({}, {"weight_decay": 0.3}),
        ({}, {"learning_rate": decay(9)}),
        ({"learning_rate": decay(9)}, {}),
        ({"learning_rate": decay(9)}, {"learning_rate": decay(8)}),
    ],
)
def test_a_resumed_run_takes_the_options_that_it_is_given(before, after, tmp_path):
    def optimizer(**options):
        return keras.optimizers.AdamW(**{"learning_rate": 0.01, **options})

    trained = fit_epochs(tmp_path, 1, optimizer(**before)).optimizer
    resumed = fit_epochs(tmp_path, 1, optimizer(**after)).optimizer
    expected = optimizer(**after)
    assert resumed.get_config() == {**expected.get_config(), "name": resumed.name}
    # The steps that were done count for a schedule too.
    assert int(ops.convert_to_numpy(resumed.iterations)) == 2
    moments = [
        [x for x in values(each.variables) if x.ndim] for each in (trained, resumed)
    ]
    assert len(moments[0]) > 2
    assert_same_values(*moments)


def rate_of(model):
    return float(ops.convert_to_numpy(model.optimizer.learning_rate))


def halving():
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)


def test_a_learning_rate_that_a_callback_changed_is_resumed(tmp_path):
    def fit(epochs, learning_rate, *callbacks):
        optimizer = keras.optimizers.Adam(learning_rate)
        return rate_of(fit_epochs(tmp_path, epochs, optimizer, callbacks))

    assert fit(2, 0.01, halving()) == pytest.approx(0.0025)
    assert fit(2, 0.01) == pytest.approx(0.0025)
    assert fit(3, 0.01, halving()) == pytest.approx(0.00125)
    # Another one is the user's.
    assert fit(4, 0.04, halving()) == pytest.approx(0.02)


@pytest.mark.any_backend
def test_a_learning_rate_that_was_changed_in_this_process_is_resumed(tmp_path):
    model = compiled_model(keras.optimizers.Adam(0.01))
    fit = dict(batch_size=4, shuffle=False, verbose=0, resume_from=tmp_path)
    for epochs in (1, 2):
        callbacks = [halving(), kcm.callbacks.Checkpoint(tmp_path)]
        model.fit(random_pairs(8), epochs=epochs, callbacks=callbacks, **fit)
    assert rate_of(model) == pytest.approx(0.0025)
    # In a new process.
    resumed = fit_epochs(tmp_path, 2, keras.optimizers.Adam(0.01))
    assert rate_of(resumed) == pytest.approx(0.0025)


@pytest.mark.any_backend
def test_learning_rates_of_several_optimizers_are_each_their_own(tmp_path):
    def optimizer(learning_rate):
        def select(variable):
            if "bias" in variable.path:
                return keras.optimizers.SGD(learning_rate)
            return keras.optimizers.Adam(0.01)

        return keras.optimizers.MultiOptimizer(select)

    fit_epochs(tmp_path, 1, optimizer(0.1), decay_vectors=True)
    resumed = fit_epochs(tmp_path, 1, optimizer(0.2), decay_vectors=True)
    rates = [each.learning_rate for each in resumed.optimizer.optimizers]
    assert np.unique(values(rates)) == pytest.approx([0.01, 0.2])


@pytest.mark.any_backend
def test_what_a_step_does_in_another_way_may_change(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = fit_epochs(whole, 2, keras.optimizers.SGD(0.1))
    fit_epochs(resumed, 1, keras.optimizers.SGD(0.1))
    found = fit_epochs(resumed, 2, keras.optimizers.SGD(0.1), micro_batch_size=2)
    assert_close(found.weights, expected.weights, 1e-5)


# === Refusals ===


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_pairs_to):
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_pairs_to(folder / f"{first}.tar", first, count)
        for first, count in ((0, 16), (16, 11), (27, 3))
    ]


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """The checkpoint of an epoch."""
    folder = tmp_path_factory.mktemp("saved")
    callbacks = [kcm.callbacks.Checkpoint(folder)]
    make_model().fit(make_dataset(shards[:2]), verbose=0, callbacks=callbacks)
    return folder


def refusal(saved, data, model):
    with pytest.raises(ValueError, match=r"`resume_from` must.*Received:") as raised:
        model.fit(data, epochs=2, verbose=0, resume_from=saved)
    return str(raised.value)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("data", "model", "field"),
    [
        ({"seed": 8}, {}, "data.seed: 7 in the checkpoint, 8 in"),
        ({"batch_size": 9}, {}, "data.batch_size: 8 in the checkpoint, 9 in"),
        ({"crop_scale": (0.9, 1.0)}, {}, "data.crop_scale.0: 0.4 in"),
        ({"resize": "squash"}, {}, "data.crop_scale: [0.4, 1.0] in"),
        ({"block_size": 4}, {}, "data.block_size: 1 in the checkpoint, 4 in"),
        (
            {},
            {"masking": kcm.RandomMasking(num_prefix_tokens=0)},
            "maskings.0.class: 'ClusterMasking' in the checkpoint",
        ),
        (
            {},
            {"masking": MASKINGS["threshold"](anchor_ratio=0.2)},
            "anchor_ratio: 0.03 in the checkpoint, 0.2 in",
        ),
        ({}, {"optimizer": "sgd"}, "optimizer.0: 'AdamW' in"),
        ({}, {"views": 2}, "views: "),
    ],
)
def test_data_or_a_model_with_another_option_is_refused(
    data, model, field, shards, saved
):
    data, model = make_dataset(shards[:2], **data), make_model(**model)
    assert field in refusal(saved, data, model)


@pytest.mark.any_backend
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0], [0, 2]])
def test_other_shards_are_refused(chosen, shards, saved):
    data = make_dataset([shards[i] for i in chosen])
    assert "data.index.0: " in refusal(saved, data, make_model())


@pytest.mark.any_backend
def test_optimizers_of_towers_and_activations_of_blocks_must_be_the_same(tmp_path):
    def fit(image, activation):
        backbone = kcm.models.clip_backbone("tiny", 16, 100, 7, activation=activation)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        model.compile(kcm.TowerOptimizer("adam", image=image), **FAST)
        checkpoint = kcm.callbacks.Checkpoint(tmp_path)
        data = {"batch_size": 4, "verbose": 0, "callbacks": [checkpoint]}
        model.fit(random_pairs(8), resume_from=tmp_path, **data)

    fit("adam", "gelu")
    with pytest.raises(ValueError, match=r"with optimizer\.1: .*'RMSprop'"):
        fit("rmsprop", "gelu")
    with pytest.raises(ValueError, match=r"with layers\.\d+: .*'quick_gelu'"):
        fit("adam", "quick_gelu")
