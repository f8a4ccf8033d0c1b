"""CLIP backbones by size."""

import numpy as np
import pytest

from keras_cluster_mask.encoders.architecture import SIZES, Architecture
from keras_cluster_mask.models import clip_backbone

pytestmark = pytest.mark.any_backend


def test_tiny_takes_the_images_texts_and_patches_it_is_told_to():
    backbone = clip_backbone("tiny", 16, 30, 6, patch_size=8)
    assert backbone.vision_encoder.patch_size == 8
    assert tuple(backbone.vision_encoder.input["images"].shape) == (None, 16, 16, 3)
    assert backbone.text_encoder.vocabulary_size == 30
    images = np.zeros((2, 16, 16, 3), "float32")
    ids = np.ones((2, 6), "int32")
    width = SIZES["tiny"].projection
    assert tuple(backbone.get_vision_embeddings(images).shape) == (2, width)
    assert tuple(backbone.get_text_embeddings(ids).shape) == (2, width)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": "huge"}, r"vit_b_16.*Received: size='huge'"),
        ({"image_size": 18}, r"divisible.*Received: image_size=18"),
        ({"patch_size": 5}, r"Received:.*patch_size=5"),
    ],
)
def test_other_sizes_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        clip_backbone(**{"size": "tiny", "image_size": 16, **options})


@pytest.mark.parametrize("size", list(SIZES)[1:])
def test_widths_and_depths_are_those_of_open_clip(size):
    open_clip = pytest.importorskip("open_clip")
    letter, patch = size.removeprefix("vit_").split("_")
    config = open_clip.get_model_config(f"ViT-{letter.upper()}-{patch}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    assert vision["patch_size"] == int(patch)
    assert SIZES[size] == Architecture(
        image_width=vision["width"],
        image_layers=vision["layers"],
        # open_clip's heads of the image tower are 64 wide.
        image_heads=vision["width"] // 64,
        image_hidden=4 * vision["width"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_hidden=4 * text["width"],
        patch=int(patch),
        projection=config["embed_dim"],
    )
