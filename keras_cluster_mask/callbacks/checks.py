def model_of(callback, attribute):
    """Returns the model of a callback, after checking that it is a `ContrastiveModel`.

    Call it once: on JAX, each access to `callback.model` copies the weights back to the
    model.
    """
    model = callback.model
    if getattr(model, attribute, None) is None:
        raise ValueError(
            f"`{type(callback).__name__}` works with the `fit` of a "
            f"`ContrastiveModel`. Received: a {type(model).__name__}"
        )
    return model
