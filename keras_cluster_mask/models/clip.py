import keras
from keras import ops

from keras_cluster_mask.models.backbone_model import BackboneModel


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class CLIPContrastiveModel(BackboneModel):
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

    backbone_class = "CLIPBackbone"
    head_name = "clip_head"

    def __init__(self, backbone, masking=None, **kwargs):
        super().__init__(backbone, masking, **kwargs)
        # It takes the class token, which is never hidden.
        self.backbone.vision_pooler.supports_masking = True

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
        # What the backbone's `text_pooler` takes out by index, which torch exports
        # for a single batch size alone: the token of the highest id, end-of-text.
        end = ops.argmax(token_ids, axis=-1)[:, None]
        end = ops.equal(ops.arange(ops.shape(tokens)[1], dtype=end.dtype), end)
        pooled = ops.sum(tokens * ops.cast(end, tokens.dtype)[:, :, None], axis=1)
        return self.backbone.text_projection(pooled)

    def get_config(self):
        # Which keras_hub's own config leaves out, and a backbone of open_clip's weights
        # has another one than keras_hub's.
        epsilon = self.backbone.text_encoder.layer_norm.epsilon
        return {**super().get_config(), "text_epsilon": epsilon}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        epsilon = config.pop("text_epsilon", None)
        model = super().from_config(config, custom_objects)
        if epsilon is not None:
            model.backbone.text_encoder.layer_norm.epsilon = epsilon
        return model
