"""Finds the subclass of `ContrastiveModel` for a keras_hub backbone."""

import keras

# By the name of the backbone's class. `backbones.py` fills it.
CLASSES: dict[str, type] = {}


def class_for(cls: type, backbone: keras.Model) -> type:
    """Returns the class of the model to make of a backbone.

    Args:
        cls: The class that the model is asked of, a `ContrastiveModel`.
        backbone: A keras_hub backbone.
    """
    names = [x.__name__ for x in type(backbone).__mro__ if x.__name__ in CLASSES]
    if not names:
        raise ValueError(
            f"`backbone` must be a keras_hub backbone of {sorted(CLASSES)}. Received: "
            f"backbone={backbone} of type {type(backbone).__name__}"
        )
    kind = CLASSES[names[0]]
    if issubclass(cls, kind):
        return cls
    # Only a base class of all of them leaves the choice to the backbone.
    if all(issubclass(each, cls) for each in CLASSES.values()):
        return kind
    raise ValueError(
        f"`from_backbone` of a subclass must be that of a `{kind.__name__}` for this "
        f"backbone: derive `{cls.__name__}` from it. Received: "
        f"backbone={backbone} of type {type(backbone).__name__}"
    )
