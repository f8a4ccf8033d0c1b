"""A `ContrastiveModel` from what users have at hand: a file, a folder, a backbone."""

import os
import pathlib
import zipfile
from typing import Any

import keras

from keras_cluster_mask.distribution.tensorflow_import import import_keras_hub
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.encoders import data_format_of, image_shape_of


def as_contrastive_model(model: Any) -> ContrastiveModel:
    """The model itself, or one made of a backbone or read from a file.

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a file that `save` wrote of one of them or
            of the folder of a keras_hub preset.

    Returns:
        A `ContrastiveModel`.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ValueError: For another model or file.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(model)
    if isinstance(model, ContrastiveModel):
        return model
    names = {x.__name__ for x in type(model).__mro__}
    if names & ContrastiveModel.for_backbone.keys():
        return ContrastiveModel.from_backbone(model)
    raise ValueError(
        "`model` must be a ContrastiveModel, a keras_hub backbone of "
        f"{sorted(ContrastiveModel.for_backbone)}, or the path of one. "
        f"Received: model={model} of type {type(model).__name__}"
    )


def image_size_of(model: Any) -> tuple[int | None, int | None]:
    """The size of the images that a model takes.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32)
    kcm.models.image_size_of(backbone)  # (32, 32)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of one that was saved.

    Returns:
        `(height, width)`, each `None` where the image encoder takes any or does not
        say.
    """
    encoder = as_contrastive_model(model).image_encoder
    shape = image_shape_of(encoder)
    return (
        (None, None)
        if shape is None
        else height_and_width(shape, data_format_of(encoder))
    )


def _load(path):
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            "`model` must be the path of a file or folder that is there. "
            f"Received: model={path}"
        )
    # What is saved may need its classes.
    keras_hub = import_keras_hub()
    if path.is_dir():
        return keras_hub.models.Backbone.from_preset(str(path))
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(
            "`model` must be the path of a .keras file that `save` wrote. "
            f"Received: model={path}"
        )
    return keras.saving.load_model(path, compile=False)
