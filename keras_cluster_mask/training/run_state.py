"""The state of a training run as arrays, and what a checkpoint of it must fit."""

import json

import keras
import numpy as np

from keras_cluster_mask.checks import is_integer
from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.training.optimizers import inner_optimizer

# What a layer's configuration says without an effect on what is computed.
INCIDENTAL = ("name", "trainable", "dtype", "seed", "build_config")
# What may differ between a run and its continuation.
FREE_OPTIONS = ("name", "micro_batch_size", "gradient_checkpointing")
FREE_METRICS = ("gradient_norm",)
# The compile options of a `ContrastiveModel` that change what is computed.
COMPILE_OPTIONS = ("learning_rate_multipliers", "decay_vectors")


def read_state(model) -> dict[str, np.ndarray]:
    """Weights, seeds, optimizer and metrics as NumPy arrays."""
    variables = {
        f"{group}/{index}": variable
        for group, variables in _groups(model).items()
        for index, variable in enumerate(variables)
    }
    variables.update(_learning_rates(model))
    return {key: np.array(to_numpy(variable)) for key, variable in variables.items()}


def write_state(model, state, groups=("model", "optimizer")):
    """Assigns arrays of `read_state`, those of some groups."""
    for group in groups:
        for index, variable in enumerate(_groups(model)[group]):
            key = f"{group}/{index}"
            # A metric that is new in the continuation starts with it.
            if key in state or group != "metrics":
                variable.assign(state[key])


def find_non_finite(model, state) -> str | None:
    """The path of a variable whose saved value is NaN or infinite, or `None`."""
    for group in ("model", "optimizer"):
        for index, variable in enumerate(_groups(model)[group]):
            if not np.isfinite(state[f"{group}/{index}"]).all():
                return variable.path
    return None


def describe(model) -> dict:
    """What a checkpoint must fit: a flat dictionary of JSON values by field."""
    fields, groups = {}, _groups(model)
    metrics = [x for x in _metrics(model) if x.name not in FREE_METRICS]
    groups["metrics"] = [v for metric in metrics for v in metric.variables]
    for group, variables in groups.items():
        fields[f"{group}.number of variables"] = len(variables)
        for index, variable in enumerate(variables):
            shape = [*variable.shape]
            fields[f"{group}.{index} ({variable.path})"] = [shape, str(variable.dtype)]
    fields["optimizer"] = type(model.optimizer).__name__
    for key, value in model.get_config().items():
        if key not in FREE_OPTIONS and not isinstance(value, dict):
            fields[key] = value
    for index, masking in enumerate(model.maskings):
        prefix = f"maskings[{index}]"
        fields[f"{prefix}.class"] = type(masking).__name__
        for key, value in masking.settings().items():
            if key not in INCIDENTAL:
                fields[f"{prefix}.{key}"] = value
    return fields


def describe_compile(model) -> dict:
    """What a model was compiled with: a flat dictionary of JSON values by field."""
    if not model.compiled:
        # Nothing to compare: `fit` refuses such a model.
        return {}
    options = {key: model.optimizer_options[key] for key in COMPILE_OPTIONS}
    for name, optimizer in _optimizers(model).items():
        for key, value in optimizer.get_config().items():
            if key != "name":
                options[f"{name}.{key}"] = value
    return {field: _readable(value) for field, value in options.items()}


def write_learning_rates(model, state, saved, given) -> list[str]:
    """Assigns the learning rates of a checkpoint, unless others are given.

    A rate may have been changed by a callback, so that it is not the one in the
    options that the model was compiled with.

    Args:
        model: A `ContrastiveModel`.
        state: Arrays of `read_state`.
        saved: What `describe_compile` returned to the run of the checkpoint.
        given: What it returns to this run. Corrected where a callback has changed the
            learning rate that the model was compiled with.

    Returns:
        The differences between `saved` and `given` that have an effect.
    """
    for field, variable in _learning_rates(model).items():
        if field not in state:
            continue
        if state[field] == to_numpy(variable):
            # A callback changed it in an earlier `fit` of this process.
            given[field] = saved.get(field)
        if given[field] == saved.get(field):
            variable.assign(state[field])
    return differences(saved, given)


def differences(saved: dict, wanted: dict) -> list[str]:
    """How two descriptions differ, a line for each field that does."""
    # As they are read from a file, and without names, which count Keras's layers.
    saved, wanted = (
        {field.split(" (")[0]: value for field, value in fields.items()}
        for fields in (saved, json.loads(json.dumps(wanted)))
    )
    return [
        f"{field}: {saved.get(field, 'nothing')!r} in the checkpoint, "
        f"{wanted.get(field, 'nothing')!r} in the model"
        for field in [*wanted, *(saved.keys() - wanted.keys())]
        if saved.get(field) != wanted.get(field)
    ]


def _groups(model):
    _build_optimizer(model)
    rates = {id(variable) for variable in _learning_rates(model).values()}
    return {
        "model": model.variables,
        "optimizer": [v for v in model.optimizer.variables if id(v) not in rates],
        "metrics": [v for metric in _metrics(model) for v in metric.variables],
    }


def _metrics(model):
    """The metrics of an epoch; the other one counts the steps of a single `fit`."""
    return [metric for metric in model.metrics if metric is not model.finite_steps]


def _build_optimizer(model):
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _optimizers(model):
    """The optimizers that have a learning rate, by their names in a description."""
    optimizer = inner_optimizer(model.optimizer)
    if not isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return {"optimizer": optimizer}
    # Which optimizers it has depends on the weights.
    _build_optimizer(model)
    return {f"optimizers[{i}]": each for i, each in enumerate(optimizer.optimizers)}


def _learning_rates(model):
    """The learning rates that are variables, not schedules, by their fields."""
    found = {
        f"{name}.learning_rate": optimizer.learning_rate
        for name, optimizer in _optimizers(model).items()
    }
    return {k: v for k, v in found.items() if isinstance(v, keras.Variable)}


def _readable(value):
    """A value of an optimizer's configuration, which may be an object's, for people."""
    if isinstance(value, dict) and "class_name" in value:
        config = value.get("config")
        if not isinstance(config, dict):
            return f"{value['class_name']} {config}"
        config = {k: _readable(v) for k, v in config.items() if k != "name"}
        arguments = ", ".join(f"{k}={v}" for k, v in config.items())
        return f"{value['class_name']}({arguments})"
    if is_integer(value):
        return int(value)
    # Keras keeps learning rates in float32.
    return float(f"{value:.7g}") if isinstance(value, (float, np.floating)) else value
