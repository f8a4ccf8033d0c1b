import math

import keras

from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.embedding_layer import (
    find_embedding_layer,
    number_positions,
)
from keras_cluster_mask.models.masked_encoder import with_masking


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class CLIPContrastiveModel(ContrastiveModel):
    """A `ContrastiveModel` around a keras_hub CLIP backbone.

    Made by `ContrastiveModel.from_clip`. It adds no weights to the backbone but
    a masking's few numbers and, for the sigmoid loss, the bias: towers,
    projections and temperature are the backbone's own.

    Args:
        backbone: A `keras_hub.models.CLIPBackbone`.
        masking: A `PatchMasking` layer, or `None`.
        **kwargs: Arguments of `ContrastiveModel`, without the encoders and
            `projection_dim`.

    Attributes:
        backbone: The backbone that is trained.
    """

    def __init__(self, backbone, masking=None, **kwargs):
        for name in ("vision_encoder", "text_encoder", "clip_head"):
            if not hasattr(backbone, name):
                raise ValueError(
                    "`backbone` must be a keras_hub CLIPBackbone. Received: "
                    f"backbone={backbone} of type {type(backbone).__name__}"
                )
        vision_encoder = backbone.vision_encoder
        number_positions(find_embedding_layer(vision_encoder))
        if masking is not None:
            vision_encoder = with_masking(vision_encoder, masking)
            # It takes the class token, which is never hidden.
            backbone.vision_pooler.supports_masking = True
        # Handed to `build_heads`, which Keras lets have no attribute before this.
        object.__setattr__(self, "_given_backbone", backbone)
        super().__init__(vision_encoder, backbone.text_encoder, **kwargs)
        self.masking = masking

    def build_heads(self):
        self.backbone = self._given_backbone
        self.logit_scale = self.backbone.clip_head.logit_scale
        if self.initial_temperature is not None:
            self.logit_scale.assign(math.log(1.0 / self.initial_temperature))

    @property
    def towers(self):
        return {
            "image": [self.image_encoder, self.backbone.vision_projection],
            "text": [self.text_encoder, self.backbone.text_projection],
        }

    def image_features(self, images, training=None):
        tokens = self.image_encoder({"images": images}, training=training)
        return self.backbone.vision_projection(self.backbone.vision_pooler(tokens))

    def text_features(self, token_ids, training=None):
        tokens = self.text_encoder({"token_ids": token_ids}, training=training)
        pooled = self.backbone.text_pooler(tokens, token_ids)
        return self.backbone.text_projection(pooled)

    def get_config(self):
        config = self.options()
        for key in ("backbone", "masking"):
            config[key] = keras.saving.serialize_keras_object(getattr(self, key))
        return config
