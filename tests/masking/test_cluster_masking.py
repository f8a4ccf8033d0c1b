import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import (
    CLEAR,
    assert_selects,
    compiled_step,
    draw_noise,
    mosaic,
    numpy,
    paper,
    photographs,
    textured,
    tokens_of,
)

ROWS = 48

# Height, width, channels, patch size, dtype, data format.
# All of 24 patches, so that what JAX compiled for one serves the others.
GEOMETRIES = {
    "uint8": (24, 16, 3, 4, "uint8", "channels_last"),
    "float32_wide": (32, 48, 3, 8, "float32", "channels_last"),
    "float16_gray": (24, 32, 1, (4, 8), "float16", "channels_last"),
    "float32_first": (48, 64, 4, (16, 8), "float32", "channels_first"),
    "bfloat16": (48, 32, 3, 8, "bfloat16", "channels_last"),
    "uint8_first": (64, 96, 3, 16, "uint8", "channels_first"),
}

MODES = {
    "budget": {},
    "budget_many_anchors": {"mask_ratio": 0.7, "anchor_ratio": 0.2},
    "soft": {"softness": 0.2},
    "threshold": {"min_mask_ratio": 0.3, "threshold": 0.14},
    "threshold_shown": {
        "min_mask_ratio": 0.5,
        "threshold": 0.14,
        "hide_padding": False,
    },
    "threshold_below_most": {"min_mask_ratio": 0.2, "threshold": -0.2},
}


def bright_pixel():
    """Black images with one bright pixel."""
    images = np.zeros((ROWS, 32, 24, 3), "uint8")
    images[:, 3, 2, 1] = 255
    return images


PLAIN = {
    "mosaic": lambda: mosaic(np.random.default_rng(2), ROWS, 4, 6, (8, 4)),
    "bright_pixel": bright_pixel,
    **{
        f"all_{value}": lambda value=value: np.full((ROWS, 32, 24, 3), value, "float32")
        for value in (0.0, 0.1, 255.0, -3.0)
    },
}


def reference_selection(
    similarity,
    noise,
    mask_ratio=0.5,
    softness=0.0,
    min_mask_ratio=None,
    threshold=None,
    hide_padding=True,
):
    """What is selected, and in which rows no rounding error can decide it."""
    rounded = reference.round_similarity(similarity)
    if min_mask_ratio is None:
        kept = reference.kept_count(noise.shape[1], mask_ratio)
        gaps = reference.gap_at_cut(similarity, noise, kept, softness)
        expected = reference.select_budget(rounded, noise, mask_ratio, softness)
        return expected, gaps > CLEAR
    is_clear = reference.margin_at_threshold(similarity, threshold) > CLEAR
    some_visible = (similarity <= threshold).any(axis=1)
    is_clear &= some_visible | (reference.gap_at_cut(similarity, noise, 1) > CLEAR)
    expected = reference.select_threshold(
        rounded, noise, min_mask_ratio, threshold, hide_padding
    )
    return expected, is_clear


def share_compared(
    images,
    patch_size,
    everywhere=False,
    seed=5,
    data_format="channels_last",
    anchor_ratio=0.03,
    **options,
):
    """Asserts the selection of the reference where it is clear, or everywhere."""
    masking = kcm.ClusterMasking(
        patch_size=patch_size,
        data_format=data_format,
        anchor_ratio=anchor_ratio,
        **options,
    )
    noise = draw_noise(np.random.default_rng(seed), ROWS, 24)
    pairwise = reference.pairwise_similarity(
        images, patch_size, data_format=data_format
    )
    anchors = reference.anchors(noise, anchor_ratio)
    similarity = reference.highest_similarity(pairwise, anchors)
    expected, rows = reference_selection(similarity, noise, **options)
    # With softness noise decides, and it is drawn afresh: cuts may be close.
    if everywhere and not masking.softness:
        rows[:] = True
    assert_selects(masking, expected, rows, images=images, noise=noise)
    return rows.mean()


class TestSelectionEqualsReference:
    @pytest.mark.one_case
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_of_textured_images_wherever_the_cut_is_clear(self, geometry):
        *sides, patch_size, dtype, data_format = GEOMETRIES[geometry]
        rng = np.random.default_rng(1)
        shares = []
        for seed, options in enumerate(MODES.values()):
            images = textured(rng, ROWS, *sides, dtype, data_format)
            options = {**options, "data_format": data_format, "seed": seed}
            shares.append(share_compared(images, patch_size, **options))
        assert min(shares) > 0.6
        # 288 rows a geometry, 1,728 in all, of which more than 1,209 are compared.
        assert np.mean(shares) > 0.7

    @pytest.mark.one_case
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", PLAIN)
    def test_of_plain_images_always(self, kind, mode):
        images = PLAIN[kind]()
        assert share_compared(images, (8, 4), everywhere=True, **MODES[mode]) > 0.7

    @pytest.mark.one_case
    @pytest.mark.parametrize("levels", [(0.0, 1.0), (0.97, 1.0)])
    @pytest.mark.parametrize("patch_size", [(8, 8), (16, 16), (32, 32)])
    def test_of_flat_patches_of_many_levels_always(self, patch_size, levels):
        # Rounding the mean of a patch must not make flat patches unlike: with
        # little contrast it is the only thing left of them.
        images = paper(np.random.default_rng(3), ROWS, 4, 6, patch_size, levels=levels)
        share_compared(images, patch_size, everywhere=True)

    def test_of_photographs_wherever_the_cut_is_clear(self):
        images = photographs(64, 96, ROWS)
        assert share_compared(images, 16) > 0.7


class TestSimilarity:
    @pytest.mark.one_case
    @pytest.mark.parametrize("weight", [0.3, 1.0, 0.0])
    @pytest.mark.parametrize("prefix", [0, 2])
    def test_with_tokens_mixes_by_weight_before_the_maximum(self, weight, prefix):
        rng = np.random.default_rng(9)
        images = textured(rng, 3, 24, 32, 3)
        tokens = tokens_of(3, prefix + 12)
        # A token of zeros is like none, not even itself.
        tokens[:, prefix + 3] = 0.0
        anchors = np.array([[0, 3], [5, 1], [11, 4]], "int32")
        masking = kcm.ClusterMasking(patch_size=8, embedding_weight=weight)
        mixed = reference.pairwise_similarity(
            images, 8, tokens=tokens[:, prefix:], weight=weight
        )
        np.testing.assert_allclose(
            numpy(masking.similarity(images, anchors, tokens)),
            reference.highest_similarity(reference.round_similarity(mixed), anchors),
            atol=2.0**-12 + 1e-6,
            rtol=0,
        )


class TestAnchors:
    @pytest.mark.any_backend
    def test_are_the_patches_of_smallest_noise_and_masked_before_their_likes(self):
        # Repeated tiles: whatever the cut, no look-alike goes before its anchor.
        rng = np.random.default_rng(14)
        images = mosaic(rng, ROWS, 6, 4, (4, 4))
        noise = draw_noise(rng, ROWS, 24)
        for mask_ratio in (0.17, 0.5, 0.9):
            masking = kcm.ClusterMasking(mask_ratio, patch_size=4, anchor_ratio=0.16)
            anchors = numpy(masking.draw_anchors(ops.convert_to_tensor(noise)))
            np.testing.assert_array_equal(anchors, np.argsort(noise, axis=1)[:, :4])
            indices, _ = numpy(*masking.select(images=images, noise=noise))
            assert not np.any(indices[:, :, None] == anchors[:, None, :])

    @pytest.mark.any_backend
    @pytest.mark.parametrize(
        ("anchor_ratio", "num_patches", "count"),
        [(0.0, 16, 1), (0.03, 196, 6), (0.1, 10, 1), (1.0, 16, 16)],
    )
    def test_number_at_least_one_and_a_share_of_the_patches(
        self, anchor_ratio, num_patches, count
    ):
        masking = kcm.ClusterMasking(patch_size=4, anchor_ratio=anchor_ratio)
        assert masking.num_anchors(num_patches) == count
        assert reference.anchor_count(num_patches, anchor_ratio) == count


class TestAdapt:
    @pytest.mark.one_case
    @pytest.mark.parametrize(
        ("mask_ratio", "min_mask_ratio", "dtype"),
        # The budget binds in the last case.
        [(0.3, 0.2, "uint8"), (0.7, 0.2, "float32"), (0.5, 0.45, "uint8")],
    )
    def test_reaches_the_target_on_photographs(self, mask_ratio, min_mask_ratio, dtype):
        images = photographs(32, 48, 20 * ROWS)
        if dtype == "float32":
            images = images.astype("float32") / 127.5 - 1.0
        batches = np.split(images, 20)
        masking = kcm.ClusterMasking(
            mask_ratio, patch_size=8, min_mask_ratio=min_mask_ratio, seed=1
        )
        masking.adapt(batches)
        assert -1.0 <= float(masking.threshold) <= 1.0
        rounds, ratios = 2, []
        for _ in range(rounds):
            visible = [numpy(*masking.select(images=images))[1] for images in batches]
            ratios.append(1.0 - np.concatenate(visible).sum(axis=1) / 24)
        if min_mask_ratio == 0.45:
            assert np.mean(ratios[0] < 0.46) > 0.1
        # Only the anchors differ from the search's: 4 standard errors of the one
        # draw it made and of the ones made here.
        ratios = np.stack(ratios)
        variance = ratios.var(axis=0, ddof=1).mean() * (1.0 + 1.0 / rounds)
        error = 4.0 * np.sqrt(variance / ratios.shape[1])
        assert error < 0.05
        assert abs(ratios.mean() - mask_ratio) < 0.01 + error

    @pytest.mark.any_backend
    def test_looks_at_pixels_alone_whatever_the_embedding_weight(self):
        images = photographs(32, 48, ROWS)
        thresholds = []
        for weight in (0.0, 1.0):
            masking = kcm.ClusterMasking(
                patch_size=8, min_mask_ratio=0.2, embedding_weight=weight, seed=1
            )
            masking.adapt(images)
            thresholds.append(float(masking.threshold))
        assert thresholds[0] == thresholds[1]

    def test_replaces_the_threshold_that_a_built_model_uses(self):
        images = photographs(32, 48, ROWS)
        masking = kcm.ClusterMasking(
            patch_size=8, min_mask_ratio=0.2, threshold=-1.0, seed=1
        )
        step = compiled_step(masking)
        step()
        assert numpy(masking.last_mask_ratio) > 0.9
        masking.adapt(images)
        step()
        assert abs(numpy(masking.last_mask_ratio) - 0.5) < 0.15

    @pytest.mark.any_backend
    @pytest.mark.parametrize(
        ("options", "data", "message"),
        [
            ({"min_mask_ratio": None}, photographs(32, 48, ROWS), "`min_mask_ratio`"),
            ({"min_mask_ratio": 0.5}, photographs(32, 48, ROWS), "`min_mask_ratio`"),
            ({}, np.full((ROWS, 32, 48, 3), 7, "uint8"), "`mask_ratio`"),
            ({}, [], "`data`"),
            ({}, np.zeros((8, 32, 30, 3)), "width of `images`"),
        ],
    )
    def test_refuses_what_cannot_be_reached_and_stays_as_it_was(
        self, options, data, message
    ):
        options = {"min_mask_ratio": 0.2, **options}
        given = None if options["min_mask_ratio"] is None else 0.25
        masking = kcm.ClusterMasking(patch_size=8, threshold=given, **options)
        with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
            masking.adapt(data)
        if given is not None:
            assert float(masking.threshold) == given

    @pytest.mark.any_backend
    def test_nothing_is_selected_before(self):
        masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.2)
        with pytest.raises(ValueError, match=r"threshold of .* is not set.*Received:"):
            masking.select(images=photographs(32, 48, 2))
        # Whole images need no threshold.
        masking.mask_ratio = 0.0
        indices, _ = masking.select(images=photographs(32, 48, 2))
        assert indices.shape == (2, 24)


class TestEmbeddingSchedule:
    @pytest.mark.one_case
    @pytest.mark.parametrize(("start", "hide_padding"), [(-0.15, True), (0.2, False)])
    def test_threshold_follows_until_the_ratio_is_back_at_the_target(
        self, start, hide_padding
    ):
        rng = np.random.default_rng(27)
        images = textured(rng, ROWS, 32, 48, 3)
        masking = kcm.ClusterMasking(
            patch_size=8,
            mask_ratio=0.5,
            min_mask_ratio=0.1,
            threshold=start,
            embedding_weight=0.8,
            hide_padding=hide_padding,
            seed=2,
        )
        tokens = tokens_of(ROWS, 1 + 24, dim=16)
        shares, ratios, thresholds = [], [], [start]
        for _ in range(45):
            noise = masking.draw(ROWS, 24)
            anchors = masking.draw_anchors(noise)
            similarity = numpy(masking.similarity(images, anchors, tokens))
            shares.append(np.mean(similarity > thresholds[-1]))
            masking(tokens, images=images, training=True, noise=noise)
            assert float(masking.threshold) == np.float32(thresholds[-1])
            masking.advance()
            ratios.append(float(masking.last_mask_ratio))
            thresholds.append(float(masking.threshold))
        assert abs(shares[0] - 0.5) > 0.2
        moved = np.diff(thresholds)
        np.testing.assert_allclose(moved, 0.05 * (np.array(shares) - 0.5), atol=1e-6)
        assert abs(np.mean(shares[-20:]) - 0.5) < 0.05
        expected = 0.5 if hide_padding else 1 - 21 / 24
        assert abs(np.mean(ratios[-20:]) - expected) < 0.05
        masking(tokens, images=images)
        masking.mask_ratio = 0.0
        masking(tokens, images=images, training=True)
        assert float(masking.threshold) == np.float32(thresholds[-1])

    @pytest.mark.any_backend
    @pytest.mark.parametrize("start", [-1.0, 1.0])
    def test_threshold_stays_in_the_range_of_similarities(self, start):
        # No threshold leaves out 40 % of images that are all alike.
        masking = kcm.ClusterMasking(
            patch_size=8,
            mask_ratio=0.4,
            min_mask_ratio=0.1,
            threshold=start,
            embedding_weight=0.01,
            hide_padding=False,
        )
        tokens = np.ones((ROWS, 17, 4), "float32")
        images = np.zeros((ROWS, 32, 32, 3), "float32")
        for _ in range(60):
            masking(tokens, images=images, training=True)
        assert abs(float(masking.threshold)) <= 1.0

    @pytest.mark.any_backend
    def test_threshold_stays_put_without_a_mix(self):
        masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.1, threshold=-0.5)
        masking(tokens_of(ROWS, 25), images=photographs(32, 48, ROWS), training=True)
        assert float(masking.threshold) == -0.5
