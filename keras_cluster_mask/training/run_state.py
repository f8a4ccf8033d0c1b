"""Reads and writes the state of a training run, and describes it for checkpoints."""

import json

import keras
import numpy as np

from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.training.layers import settings_of
from keras_cluster_mask.training.optimizers import (
    build,
    inner_optimizer,
    optimizer_parts,
)
from keras_cluster_mask.training.tokens import digest_of

# Entries of a configuration that may change when a run is resumed.
INCIDENTAL = "name", "trainable", "dtype", "seed", "micro_batch_size"


def read_state(model) -> dict[str, np.ndarray]:
    """Returns weights, seeds, learning rates and optimizer state as NumPy arrays."""
    variables = {**_variables(model), **learning_rates(model)}
    return {key: np.array(to_numpy(variable)) for key, variable in variables.items()}


def write_state(model, state):
    """Assigns the arrays of `read_state`, except for the learning rates."""
    for key, variable in _variables(model).items():
        variable.assign(state[key])


def learning_rates(model) -> dict[str, keras.Variable]:
    """Returns the learning rates that are variables, by their keys in `read_state`."""
    if not model.compiled or model.optimizer is None:
        return {}
    # A `MultiOptimizer` made from a function has no optimizers until it is built.
    build(model)
    rates = [part.learning_rate for part in optimizer_parts(model.optimizer)]
    return {
        f"learning_rate/{index}": rate
        for index, rate in enumerate(rates)
        if isinstance(rate, keras.Variable)
    }


def find_non_finite(model, state) -> str | None:
    """Returns the path of a variable with a NaN or infinite saved value, or `None`."""
    variables = _variables(model).items()
    wrong = (v.path for key, v in variables if not np.isfinite(state[key]).all())
    return next(wrong, None)


def describe(model) -> dict:
    """Returns the settings that a checkpoint must match, as a flat JSON dictionary."""
    variables = _variables(model)
    trained = {id(v) for v in model.trainable_variables}
    frozen = [i for i, v in enumerate(model.variables) if id(v) not in trained]
    parts = inner_optimizer(model.optimizer), *optimizer_parts(model.optimizer)
    fields = {
        "optimizer": [type(part).__name__ for part in parts],
        "layers": settings_of(model),
        "frozen weights": frozen,
        "tokenizer": digest_of(model, model.tokenizer),
    }
    configs = {"": model.get_config(), "head.": model.head.get_config()}
    fields["head.dtype"] = model.head.dtype_policy.name
    for index, masking in enumerate(model.maskings):
        configs[f"maskings[{index}]."] = masking.settings()
        fields[f"maskings[{index}].class"] = type(masking).__name__
    for prefix, config in configs.items():
        for key, value in config.items():
            if key not in INCIDENTAL and not isinstance(value, dict):
                fields[f"{prefix}{key}"] = value
    # Last, as there may be hundreds of differences.
    for key, v in variables.items():
        path = f"{key.replace('/', '.')} ({v.path})"
        fields[path] = [[*v.shape], str(v.dtype)]
    return fields


def differences(saved: dict, wanted: dict) -> list[str]:
    """Lists the fields in which two descriptions differ, one line per field."""
    # Compare JSON values, and leave out the paths, in which Keras numbers the layers of
    # a process.
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


def _variables(model):
    """Returns all variables but learning rates, by their keys in `read_state`."""
    rates = {id(variable) for variable in learning_rates(model).values()}
    others = [v for v in model.optimizer.variables if id(v) not in rates]
    return {
        f"{group}/{index}": variable
        for group, variables in (("model", model.variables), ("optimizer", others))
        for index, variable in enumerate(variables)
    }
