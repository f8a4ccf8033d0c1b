"""Runs layers on values in the place of their variables."""

import keras
from keras import ops


def call_statelessly(function, variables, values):
    """Calls a function as if variables had other values, and leaves them alone.

    Args:
        function: Function without arguments that calls layers.
        variables: List of all variables of the layers.
        values: List of tensors, one for each.

    Returns:
        A tuple: what the function returns; a list with the loss that layers added, if
        any did; and a list of what the variables would have become, with `None` for
        those that were not written to.
    """
    mapping = list(zip(variables, values))
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        before = [scope.get_current_value(v) for v in variables]
        outputs = function()
        losses = [sum(map(ops.sum, scope.losses))] if scope.losses else []
    after = [scope.get_current_value(v) for v in variables]
    return outputs, losses, [None if x is y else y for x, y in zip(before, after)]


def snapshot(layer, variables):
    """What variables hold now, to be found again after they are written to.

    Weights are not copied, be they frozen or not: nothing writes to them before the
    gradients are known, and they may be large.
    """
    weights = {id(v) for x in layer._flatten_layers() for v in x._trainable_variables}
    return [v if id(v) in weights else ops.copy(v) for v in variables]
