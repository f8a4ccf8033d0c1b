import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking import masking_statistics
from tests.helpers import clip_vision_encoder, random_images
from tests.masking import masking_reference as reference
from tests.masking.images import mosaic, numpy, paper, textured

IMAGES, N = 10, 24
MODES = {
    "budget": {"mask_ratio": 0.5},
    "budget_of_many_anchors": {"mask_ratio": 0.7, "anchor_ratio": 0.2},
    "budget_below_the_anchors": {"mask_ratio": 0.1, "anchor_ratio": 0.3},
    "soft": {"mask_ratio": 0.5, "softness": 0.2},
    "threshold": {"min_mask_ratio": 0.3, "threshold": 0.14},
    "threshold_shown": {
        "min_mask_ratio": 0.5,
        "threshold": 0.14,
        "hide_padding": False,
    },
    "threshold_below_all": {"min_mask_ratio": 0.2, "threshold": -1.0},
    "threshold_above_all": {"min_mask_ratio": 0.2, "threshold": 1.0},
}
KINDS = {
    "textured": lambda: textured(np.random.default_rng(1), IMAGES, 16, 24, 3),
    # Whole clusters are equally similar, and anchors to one another.
    "mosaic": lambda: mosaic(np.random.default_rng(2), IMAGES, 4, 6, (4, 4)),
    "paper": lambda: paper(np.random.default_rng(3), IMAGES, 4, 6, (4, 4)),
}


def noise_of(seed, images=IMAGES):
    return np.random.default_rng(seed).random((images, N), dtype="float32")


def cluster_masking(**options):
    return kcm.ClusterMasking(4, data_format="channels_last", **options)


def statistics_of(masking, data, **options):
    return masking_statistics(masking, data, **{"verbose": 0, **options})


def by_hand(images, noise, options):
    """The statistics by loops over images, anchors and patches."""
    pairwise = reference.mixed_similarity(images, 4)
    threshold = options.get("threshold")
    anchors = reference.anchors(noise, options.get("anchor_ratio", 0.03))
    s = reference.highest_similarity(pairwise, anchors)
    if threshold is None:
        kept, visible = reference.select_budget(
            s, noise, options["mask_ratio"], options.get("softness", 0.0)
        )
    else:
        kept, visible = reference.select_threshold(
            s,
            noise,
            options["min_mask_ratio"],
            threshold,
            options.get("hide_padding", True),
        )
    found = {
        "mask_ratio": [],
        "masked_by_position": np.zeros(N),
        "similarity_at_cut": [],
        "cluster_sizes": np.zeros(N + 1, int),
        "patches_taken": np.zeros(N + 1, int),
        "patches_taken_by_rank": np.zeros(anchors.shape[1]),
        "fill_in": 0.0,
        "surplus": 0.0,
    }
    share = 1 / N / len(images)
    for b in range(len(images)):
        seen = set(kept[b][visible[b]].tolist())
        masked = set(range(N)) - seen
        found["mask_ratio"].append(1 - len(seen) / N)
        for patch in masked:
            found["masked_by_position"][patch] += 1 / len(images)
        taken = {j for j in masked if threshold is None or s[b, j] > threshold}
        found["surplus"] += len(masked - taken) * share
        if threshold is not None:
            least = min(range(N), key=lambda j, b=b: (s[b, j], -noise[b, j], j))
            alike = {j for j in range(N) if s[b, j] > threshold}
            if len(alike) == N:
                alike.remove(least)
            found["fill_in"] += len(alike & set(kept[b].tolist())) * share
        lowest = min((s[b, j] for j in taken), default=np.nan)
        found["similarity_at_cut"].append(lowest)

        clusters = {anchor: [] for anchor in anchors[b].tolist()}
        for j in range(N):
            # `max` takes the first of equals, as the anchors are by their noise.
            of = max(clusters, key=lambda anchor, j=j: pairwise[b, anchor, j])
            clusters[j if j in clusters else of].append(j)
        for cluster in clusters.values():
            found["cluster_sizes"][len(cluster)] += 1
            found["patches_taken"][len(taken.intersection(cluster))] += 1
        counts = [len(taken.intersection(cluster)) for cluster in clusters.values()]
        found["patches_taken_by_rank"] += np.sort(counts)[::-1] / len(images)
    found["masked_by_position"] = found["masked_by_position"].reshape(4, 6)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_are_what_loops_over_the_patches_find(mode, kind):
    images, options = KINDS[kind](), MODES[mode]
    found = statistics_of(cluster_masking(**options), images, seed=7)
    expected = by_hand(images, noise_of(7), options)
    assert found.num_images == IMAGES
    assert found.num_patches == N
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, atol=1e-6, err_msg=name)


@pytest.mark.any_backend
@pytest.mark.parametrize("mode", MODES)
def test_of_patches_add_up(mode):
    options = MODES[mode]
    masking = cluster_masking(**options)
    found = statistics_of(masking, KINDS["textured"]())
    sizes = np.arange(N + 1)
    assert found.cluster_sizes.sum() == IMAGES * masking.num_anchors(N)
    assert found.cluster_sizes @ sizes == IMAGES * N
    taken = found.patches_taken @ sizes / (IMAGES * N)
    ratio = found.mask_ratio.mean()
    assert taken + found.surplus == pytest.approx(ratio, abs=1e-6)
    assert found.patches_taken_by_rank.sum() == pytest.approx(taken * N)
    assert found.masked_by_position.mean() == pytest.approx(ratio, abs=1e-6)
    hidden = found.fill_in if options.get("hide_padding", True) else 0.0
    assert 1 - found.num_kept / N + hidden == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_ratio_is_what_a_training_step_reports(mode):
    images = KINDS["textured"]()
    masking = cluster_masking(**MODES[mode])
    found = statistics_of(masking, images, seed=3)
    tokens = np.zeros((IMAGES, 1 + N, 4), "float32")
    masking(tokens, images=images, training=True, noise=noise_of(3))
    reported = float(numpy(masking.last_mask_ratio))
    assert found.mask_ratio.mean() == pytest.approx(reported, abs=1e-6)


def assert_equal(one, other):
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@pytest.mark.any_backend
@pytest.mark.parametrize("mode", ["budget", "threshold"])
def test_are_the_same_in_batches_of_any_size(mode):
    images = KINDS["textured"]()
    masking = cluster_masking(**MODES[mode])
    whole = statistics_of(masking, images, seed=5)
    for size in (1, 3):
        batches = (images[start : start + size] for start in range(0, IMAGES, size))
        assert_equal(statistics_of(masking, batches, seed=5), whole)


@pytest.mark.any_backend
def test_repeat_for_one_seed_and_differ_for_another():
    images = KINDS["textured"]()
    masking = cluster_masking()
    one, again, other = (statistics_of(masking, images, seed=s) for s in (0, 0, 1))
    assert_equal(one, again)
    assert np.any(one.masked_by_position != other.masked_by_position)
    unseeded = [statistics_of(masking, images, seed=None) for _ in range(2)]
    assert np.any(unseeded[0].masked_by_position != unseeded[1].masked_by_position)


@pytest.mark.any_backend
def test_leave_the_masking_as_it_was():
    masking = cluster_masking(min_mask_ratio=0.3, threshold=0.1, seed=1)
    before = [numpy(variable.value) for variable in masking.variables]
    statistics_of(masking, KINDS["textured"]())
    for variable, value in zip(masking.variables, before):
        np.testing.assert_array_equal(numpy(variable.value), value)


def test_look_at_images_as_the_model_prepares_them():
    images = KINDS["textured"]()
    masking = cluster_masking()
    masking.prepare_pixels = lambda pixels: ops.flip(pixels, axis=1)
    prepared = statistics_of(masking, images)
    assert_equal(prepared, statistics_of(cluster_masking(), images[:, ::-1].copy()))


@pytest.mark.any_backend
def test_take_channels_first():
    images = KINDS["textured"]()
    masking = kcm.ClusterMasking(4, data_format="channels_first")
    found = statistics_of(masking, np.moveaxis(images, -1, 1))
    assert_equal(found, statistics_of(cluster_masking(), images))


@pytest.mark.any_backend
def test_stop_an_endless_generator_at_max_images():
    images, read = KINDS["textured"](), []

    def endless():
        while True:
            read.append(4)
            yield {"images": images[:4]}

    found = statistics_of(cluster_masking(), endless(), max_images=10)
    assert found.num_images == len(found.mask_ratio) == 10
    assert sum(read) == 12


class TestOtherMaskings:
    @pytest.mark.any_backend
    def test_random_masking_has_no_clusters(self):
        masking = kcm.RandomMasking(0.7, num_prefix_tokens=1)
        images = KINDS["textured"]()
        found = statistics_of(masking, images, patch_size=4, seed=2)
        kept, _ = reference.select_random(noise_of(2), 0.7)
        masked = np.ones((IMAGES, N))
        np.put_along_axis(masked, kept, 0.0, axis=1)
        np.testing.assert_allclose(found.mask_ratio, masked.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(found.masked_by_position.ravel(), masked.mean(0))
        assert found.fill_in == 0
        assert found.cluster_sizes is found.surplus is found.lone_anchors is None
        assert "cluster" not in str(found)

    @pytest.mark.any_backend
    def test_patches_that_a_strategy_hides_are_masked(self):
        class Hiding(kcm.PatchMasking):
            hides_tokens = True

            def score(self, noise, images=None, tokens=None):
                hidden = ops.arange(noise.shape[1]) < N - 2
                return ops.where(hidden, -np.inf, noise)

        masking = Hiding(0.5, num_prefix_tokens=0)
        found = statistics_of(masking, KINDS["textured"](), patch_size=4)
        np.testing.assert_allclose(found.mask_ratio, 1 - 2 / N, rtol=1e-6)
        assert found.fill_in == pytest.approx(10 / N)
        assert found.masked_by_position.ravel().tolist() == [1.0] * (N - 2) + [0.0] * 2

    class Dimmest(kcm.PatchMasking):
        "Leaves out the patches of smallest embedding."

        def score(self, noise, images=None, tokens=None):
            return ops.sum(tokens[:, -noise.shape[1] :], axis=-1)

    def embed(self, images):
        # A patch's token is its place, forwards in dark images and backwards in light.
        place = ops.arange(N, dtype="float32") - (N - 1) / 2
        sign = ops.sign(ops.mean(ops.cast(images, "float32"), axis=(1, 2, 3)) - 0.5)
        return ops.reshape(sign, (-1, 1, 1)) * ops.reshape(-place, (1, N, 1))

    def test_embed_gives_tokens_to_a_strategy_that_looks_at_them(self):
        images = np.repeat([0.0, 1.0, 1.0, 1.0], 16 * 24 * 3).reshape(4, 16, 24, 3)
        masking = self.Dimmest(0.5, num_prefix_tokens=0)
        found = statistics_of(masking, images, patch_size=4, embed=self.embed)
        expected = np.where(np.arange(N) < N // 2, 0.25, 0.75)
        np.testing.assert_allclose(found.masked_by_position.ravel(), expected)

    def test_embed_mixes_the_tokens_of_a_cluster_masking_in(self):
        rng = np.random.default_rng(4)
        images = KINDS["textured"]()
        tokens = rng.normal(size=(IMAGES, 1 + N, 8)).astype("float32")
        masking = cluster_masking(embedding_weight=1.0)
        found = statistics_of(masking, images, embed=lambda _: tokens, seed=6)
        pairwise = reference.round_similarity(reference.token_similarity(tokens[:, 1:]))
        s = reference.highest_similarity(pairwise, reference.anchors(noise_of(6), 0.03))
        np.testing.assert_allclose(
            found.similarity_at_cut, np.sort(s, axis=1)[:, N // 2], atol=3e-4
        )

    @pytest.mark.any_backend
    def test_embed_is_asked_for_where_tokens_matter(self):
        images = KINDS["textured"]()
        message = r"`embed` must be given[\s\S]*Received: embed=None"
        masking = self.Dimmest(0.5, num_prefix_tokens=0)
        with pytest.raises(ValueError, match=message):
            statistics_of(masking, images, patch_size=4)
        for strategy in (kcm.ClusterMasking, kcm.KMeansMasking, kcm.EdgeMasking):
            # A schedule may start at 0, where tokens do not matter yet.
            for weight in (0.5, keras.optimizers.schedules.CosineDecay(0.0, 9)):
                with pytest.raises(ValueError, match=message):
                    statistics_of(strategy(4, embedding_weight=weight), images)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"data": []}, "`data` must hold at least one"),
        ({}, {"data": 3}, "`data` must be arrays or an iterable"),
        ({}, {"data": [{"photos": 3}]}, "`data` must have the key 'images'"),
        (
            {},
            {"data": np.zeros((2, 16, 18, 3))},
            "`images` must be known and divisible",
        ),
        ({}, {"data": np.zeros((16, 24, 3))}, "`images` must have rank 4"),
        (
            {},
            {"data": [np.zeros((2, 16, 24, 3)), np.zeros((2, 24, 16, 3))]},
            "`data` must all have one size",
        ),
        ({}, {"verbose": 3}, "`verbose` must be"),
        ({}, {"max_images": 0}, "`max_images` must be"),
        ({}, {"patch_size": 8}, "`patch_size` must be that of the masking"),
        ({}, {"embed": lambda images: images[:, :, :, 0]}, "`embed` must return"),
        ({"min_mask_ratio": 0.2}, {}, "threshold"),
    ],
)
def test_bad_arguments_are_named(options, arguments, message):
    arguments = {"data": np.zeros((2, 16, 24, 3), "float32"), **arguments}
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
        statistics_of(cluster_masking(**options), **arguments)


@pytest.mark.any_backend
def test_of_a_masking_without_patch_size_need_one():
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    message = r"`patch_size` must be given .*Received: patch_size=None"
    with pytest.raises(ValueError, match=message):
        statistics_of(masking, np.zeros((2, 16, 24, 3)))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("verbose", "lines"), [(0, 0), (2, 1), (1, None), ("auto", None)]
)
def test_progress_is_shown_as_in_keras(verbose, lines, capsys):
    keras.config.enable_interactive_logging()
    statistics_of(cluster_masking(), KINDS["textured"](), verbose=verbose)
    printed = capsys.readouterr().out
    if lines is not None:
        assert printed.count("\n") == lines
    if verbose:
        assert "10/10" in printed
        assert "mask_ratio: 0.5000" in printed


@pytest.mark.any_backend
def test_summary_is_a_table_of_the_numbers():
    found = statistics_of(
        cluster_masking(min_mask_ratio=0.3, threshold=0.14), KINDS["textured"]()
    )
    assert str(found) == found.summary()
    assert "10 images of 4 x 6 patches, 16 of 24 kept as tokens" in str(found)
    sizes = np.repeat(np.arange(N + 1), found.patches_taken)
    spreads = {
        "mask ratio of an image": found.mask_ratio,
        "patches an anchor takes": sizes,
    }
    for name, values in spreads.items():
        (line,) = re.findall(rf"^{name} +(.*)$", str(found), re.MULTILINE)
        mean, std, low, _, high = (float(number) for number in line.split())
        expected = [values.mean(), values.std(), values.min(), values.max()]
        np.testing.assert_allclose([mean, std, low, high], expected, atol=6e-4)
    assert f"{found.fill_in:.3f}" in str(found)
    assert f"{found.lone_anchors:.3f}" in str(found)
    assert len(repr(found)) < 120


@pytest.mark.any_backend
def test_summary_of_a_masking_that_takes_nothing_has_no_cut():
    found = statistics_of(cluster_masking(mask_ratio=0.0), KINDS["textured"]())
    assert np.isnan(found.similarity_at_cut).all()
    assert found.lone_anchors == 1.0
    assert re.search(r"similarity at the cut +- ", str(found))


def test_a_masking_that_learns_its_prefix_from_an_encoder_can_be_measured():
    masking = kcm.RandomMasking(0.5)
    encoder = kcm.with_masking(clip_vision_encoder(), masking)
    images = random_images(4)
    for embed in (None, encoder.embed_patches):
        found = kcm.masking.masking_statistics(
            masking, images, patch_size=4, embed=embed, verbose=0
        )
        np.testing.assert_array_equal(found.mask_ratio, [0.5] * 4)
