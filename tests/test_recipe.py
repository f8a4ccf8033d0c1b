import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend


def rate_at(optimizer, step):
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def expected_rate(step, steps, highest):
    """A linear warm-up over a tenth of the steps, then half a cosine (NumPy)."""
    warmup = steps // 10
    if step < warmup:
        return highest * step / warmup
    return highest * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(9, 50), (1, 25), (1, 1)])
def test_the_rate_warms_up_and_falls_to_zero(epochs, steps_per_epoch):
    optimizer = kcm.small_data_recipe(epochs, steps_per_epoch, 2e-3).optimizer
    steps = epochs * steps_per_epoch
    for step in {0, 1, steps // 10, steps // 2, steps}:
        expected = expected_rate(step, steps, 2e-3)
        assert rate_at(optimizer, step) == pytest.approx(expected, abs=1e-8), step


def test_half_of_the_patches_stay_unless_another_share_is_asked_for():
    assert kcm.small_data_recipe(1, 10).masking.num_kept(64) == 32
    assert kcm.small_data_recipe(1, 10, mask_ratio=0.25).masking.num_kept(64) == 48


def test_texts_are_masked_except_in_the_last_eighth():
    for epochs, short in ((1, 0), (2, 1), (9, 8), (30, 26), (64, 56)):
        recipe = kcm.small_data_recipe(epochs, 10)
        assert recipe.short_text_epochs == short
        assert isinstance(recipe.text_masking, kcm.data.RandomTextMasking)


def test_the_optimizer_is_that_of_the_measurements():
    optimizer = kcm.small_data_recipe(np.int64(1), np.int64(20)).optimizer
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert (optimizer.weight_decay, optimizer.beta_2) == (0.1, 0.98)
    assert rate_at(optimizer, 2) == pytest.approx(1e-3)


def test_a_seed_repeats_the_masks():
    first, again, other = (
        ops.convert_to_numpy(
            kcm.small_data_recipe(1, 10, seed=seed).masking.draw(4, 16)
        )
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("epochs", 0), ("steps_per_epoch", 0), ("learning_rate", 0.0)],
)
def test_bad_arguments_are_refused_by_name(argument, value):
    given = {"epochs": 9, "steps_per_epoch": 50, argument: value}
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        kcm.small_data_recipe(**given)
