import math

import keras
from keras import ops

from keras_cluster_mask.models.backbone_model import BackboneModel
from keras_cluster_mask.models.contrastive_model import (
    INITIAL_LOGIT_BIAS,
    INITIAL_TEMPERATURE,
)
from keras_cluster_mask.models.pixels import SIGLIP_MEAN, SIGLIP_STD


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class SigLIPContrastiveModel(BackboneModel):
    """A `ContrastiveModel` around a keras_hub SigLIP backbone.

    Made by `ContrastiveModel.from_siglip`. It adds no weights to the backbone but
    a masking's few numbers: towers, temperature and bias are the backbone's own.

    Args:
        backbone: A `keras_hub.models.SigLIPBackbone`.
        masking: A `PatchMasking` layer, or `None`.
        loss: `"sigmoid"` or `"softmax"`.
        **kwargs: Arguments of `ContrastiveModel`, without the encoders and
            `projection_dim`.

    Attributes:
        backbone: The backbone that is trained.
    """

    backbone_class = "SigLIPBackbone"
    head_name = "siglip_head"
    pixel_statistics = SIGLIP_MEAN, SIGLIP_STD

    def __init__(self, backbone, masking=None, loss="sigmoid", **kwargs):
        super().__init__(backbone, masking, loss=loss, **kwargs)

    def build_bias(self):
        head = self.backbone.siglip_head
        # keras_hub starts at a scale of 1 and a bias of 0, where nearly all pairs
        # being negatives is the first thing that would have to be learned.
        if not any(
            ops.convert_to_numpy(v) for v in (head.logit_scale, head.logit_bias)
        ):
            head.logit_scale.assign(-math.log(INITIAL_TEMPERATURE["sigmoid"]))
            head.logit_bias.assign(INITIAL_LOGIT_BIAS)
        self.logit_bias = (
            head.logit_bias if self.contrastive_loss == "sigmoid" else None
        )

    def image_features(self, images, training=None):
        return self.image_encoder({"images": images}, training=training)

    def text_features(self, token_ids, training=None):
        return self.text_encoder({"token_ids": token_ids}, training=training)
