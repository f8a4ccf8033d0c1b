def model_of(callback, attribute):
    """The model of a callback, after a check that it has what a `ContrastiveModel` has.

    To be asked for once: each access makes JAX copy the weights back to the model.
    """
    model = callback.model
    if getattr(model, attribute, None) is None:
        raise ValueError(
            f"`{type(callback).__name__}` works with the `fit` of a "
            f"`ContrastiveModel`. Received: a {type(model).__name__}"
        )
    return model
