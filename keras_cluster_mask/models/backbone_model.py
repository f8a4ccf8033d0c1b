import math

import numpy as np
from keras import ops

from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.embedding_layer import (
    find_embedding_layer,
    number_positions,
)
from keras_cluster_mask.models.masked_encoder import with_masking


class BackboneModel(ContrastiveModel):
    """A `ContrastiveModel` around a keras_hub backbone of two towers.

    A subclass says how the backbone goes from images and texts to features, and
    what its head is called.

    Args:
        backbone: A keras_hub backbone.
        masking: A `PatchMasking` layer, or `None`.
        **kwargs: Arguments of `ContrastiveModel`, without the encoders and
            `projection_dim`.

    Attributes:
        backbone: The backbone that is trained.
    """

    backbone_class = None
    head_name = None
    heads = ("backbone", "logit_scale", "logit_bias")

    def __init__(self, backbone, masking=None, **kwargs):
        for name in ("vision_encoder", "text_encoder", self.head_name):
            if not hasattr(backbone, name):
                raise ValueError(
                    f"`backbone` must be a keras_hub {self.backbone_class}. Received: "
                    f"backbone={backbone} of type {type(backbone).__name__}"
                )
        vision_encoder = backbone.vision_encoder
        number_positions(find_embedding_layer(vision_encoder))
        if masking is not None:
            vision_encoder = with_masking(vision_encoder, masking)
        # Handed to `build_heads`, which Keras lets have no attribute before this.
        object.__setattr__(self, "_given_backbone", backbone)
        super().__init__(vision_encoder, backbone.text_encoder, **kwargs)
        self.masking = masking

    def build_heads(self):
        self.backbone = self._given_backbone
        # What projections there are belong to the backbone.
        self.image_projection = self.text_projection = None
        self.logit_scale = getattr(self.backbone, self.head_name).logit_scale
        self.build_bias()
        if self.initial_temperature is not None:
            self.logit_scale.assign(math.log(1.0 / self.initial_temperature))
        for scalar in (self.logit_scale, self.logit_bias):
            if scalar is not None:
                # keras_hub's start from a Python number, a type of its own to JAX,
                # which would compile the second step once more.
                scalar.assign(np.array(ops.convert_to_numpy(scalar)))

    def arguments(self):
        return {**self.options(), "backbone": self.backbone, "masking": self.masking}
