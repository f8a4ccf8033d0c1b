"""Each vision transformer of keras_hub is masked, or refused with the reason."""

import keras
import keras_hub
import pytest
from keras_hub import models

import keras_cluster_mask as kcm
from keras_cluster_mask.models.encoders import REFUSED, image_shape_of
from tests.helpers import (
    VIT,
    clip_vision_encoder,
    deit_encoder,
    dino_encoder,
    metaclip_vision_encoder,
    random_images,
    siglip_encoder,
    vit_encoder,
)

pytestmark = pytest.mark.any_backend


def blip2():
    return models.BLIP2VisionEncoder(
        **VIT,
        image_size=16,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )


def vit_det():
    return models.ViTDetBackbone(
        hidden_size=16,
        num_layers=1,
        intermediate_dim=32,
        num_heads=2,
        global_attention_layer_indices=[0],
        image_shape=(16, 16, 3),
        patch_size=4,
        num_output_channels=8,
        window_size=2,
    )


def sam():
    return models.SAMBackbone(
        image_encoder=vit_det(),
        prompt_encoder=keras_hub.layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=4,
        ),
        mask_decoder=keras_hub.layers.SAMMaskDecoder(
            num_layers=1,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=1,
            iou_head_hidden_dim=8,
        ),
    )


def gemma3():
    return models.Gemma3VisionEncoder(**VIT, image_size=16, output_dim=8, pool_size=2)


def gemma4():
    return models.Gemma4VisionEncoder(
        **VIT, image_size=16, output_dim=8, pool_size=2, head_dim=8
    )


def dino3():
    return models.DINOV3Backbone(**VIT, image_shape=(16, 16, 3))


def swin():
    return models.SwinTransformerBackbone(
        image_shape=(32, 32, 3),
        patch_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=2,
    )


def mit():
    return models.MiTBackbone(
        layerwise_depths=[1, 1],
        image_shape=(32, 32, 3),
        hidden_dims=[8, 8],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
    )


def depth_anything():
    return models.DepthAnythingBackbone(
        image_encoder=models.DINOV2Backbone(
            **{**VIT, "num_layers": 4}, image_shape=(64, 64, 3)
        ),
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=3,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )


def video_prism():
    return models.VideoPrismBackbone(
        num_frames=2,
        patch_size=4,
        hidden_dim=16,
        intermediate_dim=32,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=0,
        vocabulary_size=0,
        num_text_layers=0,
        image_shape=(16, 16, 3),
    )


def parseq():
    return models.PARSeqBackbone(
        image_encoder=vit_encoder(),
        vocabulary_size=20,
        max_label_length=5,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=32,
    )


MASKED = {
    "BLIP2VisionEncoder": (blip2, 1),
    "CLIPVisionEncoder": (clip_vision_encoder, 1),
    "DINOV2Backbone": (dino_encoder, 3),
    "DINOV3Backbone": (dino3, 5),
    "DeiTBackbone": (deit_encoder, 2),
    "MetaCLIP2VisionEncoder": (metaclip_vision_encoder, 1),
    "SigLIPVisionEncoder": (siglip_encoder, 0),
    "ViTBackbone": (vit_encoder, 1),
}
REASONS = {
    "DepthAnythingBackbone": (depth_anything, "take its `image_encoder`"),
    "Gemma3VisionEncoder": (gemma3, "in one layer"),
    "Gemma4VisionEncoder": (gemma4, "in one layer"),
    "MiTBackbone": (mit, "merges neighboring patches"),
    "PARSeqBackbone": (parseq, "take its `image_encoder`"),
    "SAMBackbone": (sam, "within windows"),
    "SwinTransformerBackbone": (swin, "within windows"),
    "VideoPrismBackbone": (video_prism, "reads videos"),
    "ViTDetBackbone": (vit_det, "within windows"),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    ("options", "kept"), [({}, 8), ({"min_mask_ratio": 0.25, "threshold": 0.0}, 12)]
)
def test_an_encoder_is_masked_after_its_prefix_and_positions(name, options, kept):
    make, prefix = MASKED[name]
    encoder = make()
    assert type(encoder).__name__ == name
    masked = kcm.with_masking(encoder, kcm.ClusterMasking(4, **options))
    assert masked.num_prefix_tokens == prefix
    images = random_images(2, *image_shape_of(encoder)[:2])
    given = encoder.input
    inputs = dict.fromkeys(given, images) if isinstance(given, dict) else images
    trained = masked(inputs, training=True)
    if name != "SigLIPVisionEncoder":  # It pools.
        assert trained.shape == (2, prefix + kept, 16)


@pytest.mark.parametrize("name", REASONS)
def test_an_encoder_that_cannot_leave_out_tokens_is_refused_with_the_reason(name):
    make, reason = REASONS[name]
    encoder = make()
    assert type(encoder).__name__ == name
    # Also under another name, and whatever layer is named.
    wrapped = keras.Model(encoder.input, encoder.output)
    layers = [None, *(layer.name for layer in encoder.layers)]
    for model, layer in ((encoder, None), *((wrapped, layer) for layer in layers)):
        with pytest.raises(ValueError, match=rf"`encoder`.*{reason}.*Received: "):
            kcm.with_masking(model, kcm.RandomMasking(0.5), layer)


def test_the_table_names_layers_that_keras_hub_has():
    found = {type(x).__name__ for make, _ in REASONS.values() for x in make().layers}
    # Those of two more need large models, or are no public encoders.
    assert set(REFUSED) - found == {"PaliGemmaVitEncoder", "SAM3VisionEncoder"}


def test_no_vision_encoder_of_keras_hub_is_missing():
    names = {x for x in dir(models) if x.endswith("VisionEncoder")}
    assert names <= MASKED.keys() | REASONS.keys()
