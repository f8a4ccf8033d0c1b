"""The state of a training run as arrays, and what a checkpoint of it must fit."""

import json

import keras
import numpy as np

from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.training.optimizers import optimizer_parts

# What a layer's configuration says without an effect on what is computed.
INCIDENTAL = ("name", "trainable", "dtype", "seed", "build_config")
# What may differ between a run and its continuation.
FREE_OPTIONS = ("name", "micro_batch_size", "gradient_checkpointing")


def read_state(model) -> dict[str, np.ndarray]:
    """Weights, seeds, learning rates and the optimizer's state as NumPy arrays."""
    variables = {
        f"{group}/{index}": variable
        for group, variables in _groups(model).items()
        for index, variable in enumerate(variables)
    }
    variables.update(_learning_rates(model))
    return {key: np.array(to_numpy(variable)) for key, variable in variables.items()}


def write_state(model, state):
    """Assigns arrays of `read_state`, except for the learning rates."""
    for group, variables in _groups(model).items():
        for index, variable in enumerate(variables):
            variable.assign(state[f"{group}/{index}"])


def learning_rates(model) -> dict[str, float]:
    """The learning rates of a model's optimizers, without those of schedules."""
    if not model.compiled or model.optimizer is None:
        return {}
    return {key: float(to_numpy(v)) for key, v in _learning_rates(model).items()}


def restore_learning_rates(model, state, first_rates) -> dict[str, float]:
    """Assigns the learning rates of a checkpoint that callbacks have changed.

    A rate that the user has changed since then is kept.

    Args:
        model: A `ContrastiveModel`.
        state: Arrays of `read_state`.
        first_rates: What `learning_rates` returned at the start of the saved run.

    Returns:
        The same of the continued run, without what callbacks have changed.
    """
    found = learning_rates(model)
    for key, variable in _learning_rates(model).items():
        # In the process of the saved run, it still has the value of the callback.
        if key in state and found[key] in (first_rates[key], float(state[key])):
            variable.assign(state[key])
            found[key] = first_rates[key]
    return found


def find_non_finite(model, state) -> str | None:
    """The path of a variable whose saved value is NaN or infinite, or `None`."""
    for group in ("model", "optimizer"):
        for index, variable in enumerate(_groups(model)[group]):
            if not np.isfinite(state[f"{group}/{index}"]).all():
                return variable.path
    return None


def describe(model) -> dict:
    """What a checkpoint must fit: a flat dictionary of JSON values by field."""
    fields = {}
    for group, variables in _groups(model).items():
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
    rates = {id(variable) for variable in _learning_rates(model).values()}
    return {
        "model": model.variables,
        "optimizer": [v for v in model.optimizer.variables if id(v) not in rates],
    }


def _learning_rates(model):
    """The learning rates that are variables, by their keys in `read_state`."""
    if model.built and not model.optimizer.built:
        # A `MultiOptimizer` of a function does not know its optimizers before.
        model.optimizer.build(model.trainable_variables)
    rates = [part.learning_rate for part in optimizer_parts(model.optimizer)]
    return {
        f"learning_rate/{index}": rate
        for index, rate in enumerate(rates)
        if isinstance(rate, keras.Variable)
    }
