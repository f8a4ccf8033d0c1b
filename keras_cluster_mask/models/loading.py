"""Makes a `ContrastiveModel` from a file, a folder or a backbone."""

import os
import pathlib
import zipfile
from typing import Any

import keras

from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.models.backbone_classes import CLASSES
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.encoders import data_format_of, image_shape_of


def as_contrastive_model(model: Any) -> ContrastiveModel:
    """Returns the model itself, or one made from a backbone or read from a file.

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or a path: a file that `save` of one of these wrote, or
            the folder of a keras_hub preset.

    Returns:
        A `ContrastiveModel`.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: For an unsupported model or file.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(model)
    if isinstance(model, ContrastiveModel):
        return model
    names = {x.__name__ for x in type(model).__mro__}
    if names & CLASSES.keys():
        return ContrastiveModel.from_backbone(model)
    raise ValueError(
        "`model` must be a ContrastiveModel, a keras_hub backbone of "
        f"{sorted(CLASSES)}, or the path of one. "
        f"Received: model={model} of type {type(model).__name__}"
    )


def image_size_of(model: Any) -> tuple[int | None, int | None]:
    """Returns the size of the images that a model takes.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32)
    kcm.models.image_size_of(backbone)  # (32, 32)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.

    Returns:
        `(height, width)`. Each is `None` if the image encoder accepts any size or does
        not define one.
    """
    encoder = as_contrastive_model(model).image_encoder
    shape = image_shape_of(encoder)
    if shape is None:
        return None, None
    return height_and_width(shape, data_format_of(encoder))


def _load(path):
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            "`model` must be the path of a file or folder that is there. "
            f"Received: model={path}"
        )
    # The saved model may need keras_hub's classes.
    keras_hub = import_keras_hub()
    if path.is_dir():
        return keras_hub.models.Backbone.from_preset(str(path))
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(
            "`model` must be the path of a .keras file that `save` wrote. "
            f"Received: model={path}"
        )
    return keras.saving.load_model(path, compile=False)
