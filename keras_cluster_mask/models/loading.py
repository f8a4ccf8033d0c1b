"""Makes a `ContrastiveModel` from a file, a folder or a backbone."""

import os
import pathlib

import keras

from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.models.contrastive_model import ContrastiveModel

# A `ContrastiveModel`, a backbone, or the path of either.
AnyModel = keras.Model | str | os.PathLike


def as_contrastive_model(model: AnyModel) -> ContrastiveModel:
    """Returns the model itself, or one made from a backbone or read from a file.

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or a path: a file that `save` of one of these wrote, or
            the folder of a keras_hub preset.

    Returns:
        A `ContrastiveModel`.

    Raises:
        ValueError: For an unsupported model or file.
    """
    if isinstance(model, str | os.PathLike):
        path = pathlib.Path(model).expanduser()
        if path.is_dir():
            return ContrastiveModel.from_preset(str(path))
        # The saved model may need keras_hub's classes.
        import_keras_hub()
        model = keras.saving.load_model(path, compile=False)
    if isinstance(model, ContrastiveModel):
        return model
    return ContrastiveModel.from_backbone(model)
