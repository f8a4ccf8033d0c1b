"""Floating-point operations, against what torch counts in open_clip's models."""

import pytest
from flops import training_flops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.architecture import SIZES

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def counted(name, patch_dropout=0.0):
    """Operations of open_clip's model for one pair: forward, and with backward."""
    open_clip = pytest.importorskip("open_clip")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # On a device that computes shapes alone.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = open_clip.create_model(
            name, pretrained=None, device="meta", force_patch_dropout=patch_dropout
        ).train()
        images = model.encode_image(torch.zeros(1, 3, 224, 224))
        texts = model.encode_text(torch.zeros(1, 77, dtype=torch.long))
        forward = counter.get_total_flops()
        (images.sum() + texts.sum()).backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "mask_ratio"), [*((size, 0.0) for size in SIZES), ("vit_b_16", 0.5)][1:]
)
def test_a_step_is_counted_as_torch_counts_open_clips(size, mask_ratio):
    letter, patch = size.removeprefix("vit_").split("_")
    forward, training = counted(f"ViT-{letter.upper()}-{patch}", mask_ratio)
    found = training_flops(size, masking=kcm.RandomMasking(mask_ratio))
    assert found == 3 * forward
    # Nothing is differentiated with respect to pixels, a per cent less.
    assert found == pytest.approx(training, rel=0.01)


@pytest.mark.parametrize(
    ("masking", "products"),
    [
        # 6 anchors with 196 patches; a mix with as many tokens, as wide as the pixels.
        (kcm.ClusterMasking(patch_size=16), 6 * 196),
        (kcm.ClusterMasking(patch_size=16, embedding_weight=0.5), 2 * 6 * 196),
        # All patches with all.
        (kcm.KMeansMasking(patch_size=16), 196 * 196),
        (kcm.EdgeMasking(patch_size=16), 196 * 196),
    ],
)
def test_choosing_patches_is_counted_once(masking, products):
    random = training_flops("vit_b_16", masking=kcm.RandomMasking(0.5))
    assert training_flops("vit_b_16", masking=masking) - random == 2 * products * 768
