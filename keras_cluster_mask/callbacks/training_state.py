"""All that a training run is made of, as arrays and back."""

import numpy as np

from keras_cluster_mask.distribution import to_numpy

# What a layer's configuration says without deciding what is computed.
INCIDENTAL = ("name", "trainable", "dtype", "seed", "build_config")
# What may differ between a run and its continuation.
FREE_OPTIONS = ("name", "micro_batch_size", "loss_block_size", "remat")
FREE_METRICS = ("gradient_norm",)


def read_state(model):
    """A dictionary of NumPy arrays: weights, seeds, optimizer and metrics."""
    return {
        f"{group}/{index}": np.array(to_numpy(variable))
        for group, variables in _groups(model).items()
        for index, variable in enumerate(variables)
    }


def write_state(model, state, groups=("model", "optimizer")):
    """Puts arrays of `read_state` back, those of some groups."""
    for group in groups:
        for index, variable in enumerate(_groups(model)[group]):
            key = f"{group}/{index}"
            # A metric that is new in the continuation starts with it.
            if key in state or group != "metrics":
                variable.assign(state[key])


def describe(model):
    """What a checkpoint must fit: a flat dictionary of JSON values by field."""
    fields, groups = {}, _groups(model)
    metrics = [x for x in model.metrics if x.name not in FREE_METRICS]
    groups["metrics"] = [v for metric in metrics for v in metric.variables]
    for group, variables in groups.items():
        fields[f"{group}.number of variables"] = len(variables)
        for index, variable in enumerate(variables):
            shape = [*variable.shape]
            fields[f"{group}.{index} ({variable.path})"] = [shape, str(variable.dtype)]
    fields["optimizer"] = type(model.optimizer).__name__
    for key, value in getattr(model, "options", dict)().items():
        if key not in FREE_OPTIONS:
            fields[key] = value
    for index, masking in enumerate(getattr(model, "maskings", ())):
        prefix = f"maskings[{index}]"
        fields[f"{prefix}.class"] = type(masking).__name__
        for key, value in masking.get_config().items():
            if key not in INCIDENTAL:
                fields[f"{prefix}.{key}"] = value
    return fields


def differences(saved, wanted):
    """How two descriptions differ, a line for each field that does."""
    saved, wanted = _without_names(saved), _without_names(wanted)
    return [
        f"{field}: {saved.get(field, 'nothing')!r} in the checkpoint, "
        f"{wanted.get(field, 'nothing')!r} in the model"
        for field in [*wanted, *(saved.keys() - wanted.keys())]
        if saved.get(field) != wanted.get(field)
    ]


def _groups(model):
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return {
        "model": model.variables,
        "optimizer": [] if model.optimizer is None else model.optimizer.variables,
        "metrics": model.metrics_variables,
    }


def _without_names(fields):
    # Names that Keras made up count the layers of a process.
    return {field.split(" (")[0]: value for field, value in fields.items()}
