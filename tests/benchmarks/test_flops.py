"""Floating-point operations, against what torch counts in open_clip's models."""

import sys
from pathlib import Path

import keras
import pytest

import keras_cluster_mask as kcm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from flops import training_flops

from keras_cluster_mask.models.sizes import SIZES

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


@pytest.mark.parametrize("size", list(SIZES)[1:])
def test_towers_are_counted_as_torch_counts_open_clips(size):
    letter, patch = size.removeprefix("vit_").split("_")
    forward, training = counted(f"ViT-{letter.upper()}-{patch}")
    assert training_flops(size) == 3 * forward
    # Nothing is differentiated with respect to pixels, a per cent less.
    assert training_flops(size) == pytest.approx(training, rel=0.01)


def test_masked_patches_are_embedded_and_cost_nothing_more():
    forward, training = counted("ViT-B-16", patch_dropout=0.5)
    masked = training_flops("vit_b_16", masking=kcm.RandomMasking(0.5))
    assert masked == 3 * forward
    assert masked == pytest.approx(training, rel=0.01)


def test_whole_images_cost_what_open_clip_publishes():
    # docs/model_profile.csv there, forward, in billions.
    for size, published in (("vit_s_16", 12.58), ("vit_b_16", 41.09)):
        assert training_flops(size) / 3e9 == pytest.approx(published, abs=0.005)


def test_choosing_patches_is_counted_once():
    flops = {
        weight: training_flops(
            "vit_b_16", masking=kcm.ClusterMasking(16, embedding_weight=weight)
        )
        for weight in (0.0, 0.5)
    }
    random = training_flops("vit_b_16", masking=kcm.RandomMasking(0.5))
    # 6 anchors with 196 patches of 768 pixels; and as many tokens 768 wide.
    assert flops[0.0] - random == 2 * 6 * 196 * 768
    assert flops[0.5] - random == 2 * (2 * 6 * 196 * 768)
    # All patches with all.
    for masking in (kcm.KMeansMasking(16), kcm.EdgeMasking(16)):
        flops = training_flops("vit_b_16", masking=masking)
        assert flops - random == 2 * 196 * 196 * 768


def test_two_views_of_half_the_patches_cost_about_as_much_as_the_whole_image():
    whole, random = training_flops("vit_b_16"), kcm.RandomMasking(0.5)
    both = training_flops("vit_b_16", masking=random, views=2)
    one = training_flops("vit_b_16", masking=random)
    text = training_flops("vit_b_16", masking=random, views=0)
    # All but the patches and the texts, which are embedded once, is done twice.
    assert both - text == 2 * (one - text)
    assert 0.97 < both / whole <= 1.05


def test_the_pass_of_a_teacher_is_counted_as_torch_counts_it():
    if keras.backend.backend() != "torch":
        pytest.skip("counts operations of torch")
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    encoder = kcm.models.clip_backbone("tiny", image_size=64).vision_encoder
    random = training_flops("tiny", 64, masking=kcm.RandomMasking(0.5))
    for side in (None, 32):
        teacher = kcm.models.MomentumEncoder(encoder, image_size=side)
        # The fused attention of CPUs is not counted.
        math = sdpa_kernel(SDPBackend.MATH)
        with math, FlopCounterMode(display=False) as counter:
            teacher.attention(torch.zeros(1, 64, 64, 3))
        attentive = training_flops("tiny", 64, masking=kcm.AttentiveMasking(teacher))
        assert attentive - random == counter.get_total_flops()


def test_a_threshold_costs_what_its_least_share_leaves():
    threshold = kcm.ClusterMasking(16, 0.6, min_mask_ratio=0.3, threshold=0.5)
    exact = kcm.ClusterMasking(16, 0.3)
    assert training_flops("vit_b_16", masking=threshold) == training_flops(
        "vit_b_16", masking=exact
    )


def test_images_texts_and_patches_count():
    assert (
        training_flops("tiny", image_size=32, patch_size=4)
        == training_flops("tiny", image_size=64, patch_size=8)
        - 3 * 2 * 64 * 3 * (64 - 16) * 96
    )
    longer = training_flops("tiny", context_length=2) - training_flops(
        "tiny", context_length=1
    )
    assert longer == 3 * (24 * 96**2 + 4 * 3 * 96)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"vit_b_16.*Received: size='huge'"):
        training_flops("huge")
    with pytest.raises(ValueError, match=r"Received: image_size=225, patch_size=16"):
        training_flops("vit_b_16", 225)
