"""Updates in place on torch: Keras's results in Keras's variables, without copies."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_cluster_mask.distribution import gradients
from keras_cluster_mask.training.optimizers import inner_optimizer
from tests.helpers import (
    assert_same_values,
    random_pairs,
    small_model,
    to_numpy,
    values,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="other backends update by compiled code"
)

if keras.backend.backend() == "torch":
    from keras_cluster_mask.distribution import torch_updates

SHAPES = [(8, 16), (16,), (3, 4, 5), (7,)]
Adam, AdamW, SGD = (getattr(keras.optimizers, x) for x in ("Adam", "AdamW", "SGD"))
OPTIMIZERS = {
    "adam": lambda: Adam(0.01),
    "adam-betas": lambda: Adam(0.01, beta_1=0.5, beta_2=0.95, epsilon=1e-3),
    "adam-no-momentum": lambda: Adam(0.01, beta_1=0.0),
    "amsgrad": lambda: Adam(0.01, amsgrad=True),
    "adamw": lambda: AdamW(0.01, weight_decay=0.3),
    "global-clipnorm": lambda: AdamW(0.01, global_clipnorm=0.5),
    "clipnorm": lambda: AdamW(0.01, clipnorm=0.5),
    "schedule": lambda: AdamW(keras.optimizers.schedules.CosineDecay(0.01, 30)),
    "averages": lambda: AdamW(
        0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=6
    ),
    "accumulation": lambda: AdamW(
        0.01, gradient_accumulation_steps=4, global_clipnorm=0.1
    ),
    "loss-scale": lambda: AdamW(0.01, loss_scale_factor=64.0, global_clipnorm=0.01),
    "loss-scale-optimizer": lambda: keras.optimizers.LossScaleOptimizer(
        AdamW(0.01, global_clipnorm=0.01), initial_scale=64.0, dynamic_growth_steps=5
    ),
    "sgd": lambda: SGD(0.01, global_clipnorm=0.5),
    "momentum": lambda: SGD(0.01, momentum=0.9, global_clipnorm=0.5),
    "lion": lambda: keras.optimizers.Lion(0.01, global_clipnorm=0.5),
}


def make_variables(shapes=SHAPES, dtype="float32"):
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"weight_{i}")
        for i, shape in enumerate(shapes)
    ]


def gradients_of_step(step, variables):
    rng = np.random.default_rng(step + 1)
    # Those of the second are about as large as epsilon.
    scales = [1.0, 1e-7, 1e-3, 0.1]
    return [
        ops.cast(rng.normal(size=v.shape) * scale, v.dtype)
        for v, scale in zip(variables, scales)
    ]


def train(optimizer, variables, steps=range(20)):
    for step in steps:
        optimizer.apply(gradients_of_step(step, variables), variables)
    return optimizer, variables


def assert_same_state(result, expected):
    """Compares weights and the optimizer's variables of two returns of `train`."""
    found, expected = (
        [to_numpy(x) for x in [*variables, *optimizer.variables]]
        for optimizer, variables in (result, expected)
    )
    for x, y in zip(found, expected, strict=True):
        atol = 1e-6 * np.abs(y).max(initial=0)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol)


def in_place(optimizer):
    inner = inner_optimizer(optimizer)
    gradients.wrap_optimizer(optimizer, inner, [inner])
    return optimizer


@pytest.fixture
def updated(monkeypatch):
    """How many weights each update in place was of."""
    counts, adam = [], torch_updates.adam

    def watched(optimizer, weights, *args):
        counts.append(len(weights))
        adam(optimizer, weights, *args)

    monkeypatch.setattr(torch_updates, "adam", watched)
    return counts


# === The same results ===


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_are_those_of_keras(make, updated):
    result = train(in_place(make()), make_variables())
    assert_same_state(result, train(make(), make_variables()))
    steps = inner_optimizer(result[0]).gradient_accumulation_steps or 1
    adam = inner_optimizer(result[0])
    is_adam = isinstance(adam, Adam) and not adam.amsgrad
    assert updated == ([4] * (20 // steps) if is_adam else [])


def assert_as_in_keras(run):
    """Compares what a function trains with an optimizer in place and with Keras's."""
    found, expected = run(in_place), run(lambda x: x)
    assert_same_state(found, expected)
    return found


def test_weights_without_gradients_stay_as_they_are():
    def run(prepare):
        optimizer, variables = prepare(AdamW(0.01)), make_variables()
        optimizer.build(variables)
        gradients = gradients_of_step(0, variables)
        gradients[1] = None
        with pytest.warns(UserWarning, match=r"do not exist for.*weight_1"):
            optimizer.apply(gradients, variables)
        return optimizer, variables

    _, variables = assert_as_in_keras(run)
    assert_same_values(variables[1:2], make_variables()[1:2])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_is_not_hidden_by_clipping(bad):
    optimizer, variables = in_place(SGD(0.1, global_clipnorm=1.0)), make_variables()
    gradients = gradients_of_step(0, variables)
    gradients[3] = ops.full((7,), bad)
    optimizer.apply(gradients, variables)
    assert all(np.isnan(to_numpy(v)).all() for v in variables)


def test_steps_with_infinite_gradients_are_skipped_under_loss_scaling():
    def run(prepare):
        optimizer = prepare(OPTIMIZERS["loss-scale-optimizer"]())
        variables = make_variables()
        train(optimizer, variables, range(3))
        optimizer.apply([ops.full(v.shape, np.inf) for v in variables], variables)
        return train(optimizer, variables, range(3, 6))

    optimizer, _ = assert_as_in_keras(run)
    assert int(optimizer.iterations) == 6


# === The same state ===


@pytest.mark.parametrize("kind", ["adamw", "averages"])
@pytest.mark.parametrize("order", [1, -1], ids=["in place first", "keras first"])
def test_a_run_continues_in_the_other_kind_of_update(kind, order):
    begins, ends = [in_place(OPTIMIZERS[kind]()), OPTIMIZERS[kind]()][::order]
    _, variables = train(begins, make_variables(), range(10))
    ends.build(variables)
    assert [v.shape for v in ends.variables] == [v.shape for v in begins.variables]
    ends.set_weights(values(begins.variables))
    result = train(ends, variables, range(10, 20))
    assert_same_state(result, train(OPTIMIZERS[kind](), make_variables()))


def test_variables_keep_their_memory():
    optimizer, variables = train(in_place(AdamW(0.01)), make_variables(), range(1))
    held = [*variables, *optimizer.variables]
    before = [v.value.data_ptr() for v in held]
    train(optimizer, variables, range(1, 3))
    assert [v.value.data_ptr() for v in held] == before


def allocated_by(function):
    """How many bytes a function allocates in all."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return sum(max(0, x.self_cpu_memory_usage) for x in profile.events())


@pytest.mark.parametrize("kind", ["adamw", "global-clipnorm", "momentum"])
def test_updates_need_no_memory_for_copies(kind):
    shapes = [(256, 512), (512, 256)]
    size = 4 * sum(map(np.prod, shapes))
    variables = make_variables(shapes)
    gradients = gradients_of_step(1, variables)

    def allocated(optimizer):
        train(optimizer, variables, range(1))
        return allocated_by(lambda: optimizer.apply(gradients, variables))

    # Keras's own update of SGD, which is not replaced, copies gradients from 3.16 on.
    own = allocated(SGD(0.01, momentum=0.9)) if kind == "momentum" else 0
    assert allocated(in_place(OPTIMIZERS[kind]())) < own + 0.01 * size
    # What the profiler counts of Keras's own.
    assert allocated(OPTIMIZERS[kind]()) > 0.9 * size


# === What Keras updates ===


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_of_other_dtypes_are_updated_by_keras(dtype, updated):
    def run(prepare):
        others = make_variables(SHAPES[2:], dtype=dtype)
        optimizer = prepare(AdamW(0.01, global_clipnorm=0.5, epsilon=1e-3))
        return train(optimizer, [*make_variables(SHAPES[:2]), *others])

    assert_as_in_keras(run)
    assert updated == []


def test_the_order_of_values_in_memory_does_not_matter(updated):
    import torch

    def run(prepare):
        optimizer = prepare(AdamW(0.01, global_clipnorm=0.5))
        columns = torch.arange(12.0).reshape(3, 4).T
        variables = [keras.Variable(columns, name="columns"), *make_variables()[:2]]
        assert not variables[0].value.is_contiguous()
        for step in range(5):
            gradients = gradients_of_step(step, variables)
            # A transposed gradient, and one that is one number in memory.
            gradients[1] = gradients[1].T.contiguous().T
            gradients[2] = torch.tensor(0.1).expand(16)
            optimizer.apply(gradients, variables)
        return optimizer, variables

    assert_as_in_keras(run)
    assert updated == []


def test_a_subclass_updates_in_its_own_way():
    class Still(AdamW):
        def update_step(self, gradient, variable, learning_rate):
            pass

        def _clip_gradients(self, gradients):
            clipped.append(len(gradients))
            return gradients

    clipped, optimizer = [], Still(0.01, weight_decay=0.0, global_clipnorm=0.5)
    _, variables = train(in_place(optimizer), make_variables(), range(1))
    assert_same_values(variables, make_variables())
    assert clipped == [4]


# === In a model ===


def test_a_compiled_model_is_updated_in_place(updated):
    model = small_model(projection_dim=8)
    model.compile(AdamW(0.01, global_clipnorm=1.0))
    model.fit(random_pairs(16), batch_size=8, verbose=0)
    assert updated == [len(model.trainable_variables)] * 2
