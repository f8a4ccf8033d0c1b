import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import visualization
from keras_cluster_mask.visualization.images import LEFT_OUT
from tests.helpers import FAST, image_mlp, random_pairs, text_bag


def statistics_of(masking, images, **options):
    return kcm.masking.masking_statistics(masking, images, verbose=0, **options)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype("uint8")


def drawn(axis):
    return axis.get_images()[0].get_array()


def shown_patches(axes):
    """The patches of 8 x 8 pixels that an axis shows as another one does."""
    original, masked = map(drawn, axes)
    same = np.all(np.isclose(original, masked), axis=-1)
    return same.reshape(2, 8, 3, 8).all(axis=(1, 3)).ravel()


def test_mask_images_gray_out_what_the_masking_leaves_out(images):
    masking = kcm.ClusterMasking(
        patch_size=8, mask_ratio=0.5, data_format="channels_last"
    )
    noise = np.random.default_rng(1).random((2, 6)).astype("float32")
    figure = visualization.plot_masks(images, masking, noise=noise)
    axes = np.reshape(figure.axes[:10], (2, 5))
    indices, _ = masking.select(images, noise=noise)
    for row, kept in zip(axes, ops.convert_to_numpy(indices)):
        shown = shown_patches((row[0], row[2]))
        np.testing.assert_array_equal(np.flatnonzero(shown), kept)


@pytest.mark.any_backend
def test_random_masking_beside_it_has_the_same_budget(images):
    masking = kcm.ClusterMasking(
        patch_size=8, mask_ratio=0.5, data_format="channels_last"
    )
    figure = visualization.plot_masks(images, masking)
    left_out = [
        np.mean(np.all(np.isclose(drawn(axis), LEFT_OUT), axis=-1))
        for axis in figure.axes[1:3]
    ]
    assert left_out == [0.5, 0.5]


@pytest.mark.any_backend
def test_of_another_masking_the_image_and_what_is_left_of_it_are_shown(images):
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    figure = visualization.plot_masks(images, masking, patch_size=8, seed=3)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["image", "RandomMasking"]
    noise = np.random.default_rng(3).random((2, 6))
    for axes, scores in zip(np.reshape(figure.axes, (2, 2)), noise):
        np.testing.assert_array_equal(
            np.flatnonzero(shown_patches(axes)), np.sort(np.argsort(scores)[3:])
        )


def test_maskings_are_compared_on_the_same_images_and_noise(images):
    last = {"data_format": "channels_last"}
    maskings = {
        "at random": kcm.RandomMasking(0.5),
        "the same": kcm.RandomMasking(0.5, num_prefix_tokens=1),
        "center": kcm.CenteredMasking(0.5, grid=(2, 3)),
        "clusters": kcm.ClusterMasking(8, anchor_ratio=0.2, **last),
        "by threshold": kcm.ClusterMasking(
            8, min_mask_ratio=0.3, threshold=0.0, anchor_ratio=0.2, **last
        ),
    }
    noise = np.random.default_rng(1).random((2, 6)).astype("float32")
    figure = visualization.plot_masks(images, maskings, noise)
    assert [axis.get_title() for axis in figure.axes[:6]] == ["image", *maskings]
    for index, row in enumerate(np.reshape(figure.axes, (2, 6))):
        np.testing.assert_allclose(drawn(row[0]), images[index] / 255.0, atol=1e-6)
        for axis, masking in zip(row[1:], maskings.values()):
            tokens = ops.zeros((2, 6 + (masking.num_prefix_tokens or 0), 1))
            if masking.num_prefix_tokens is None:
                masking.num_prefix_tokens = 0
            kept, visible = masking.select(images, tokens, noise)
            kept, visible = ops.convert_to_numpy(kept), ops.convert_to_numpy(visible)
            np.testing.assert_array_equal(
                np.flatnonzero(shown_patches((row[0], axis))),
                kept[index][visible[index]],
            )


@pytest.mark.any_backend
def test_maskings_of_a_list_are_titled_by_their_classes(images):
    masking = kcm.ClusterMasking(8, data_format="channels_last")
    for maskings, names in (
        ([masking], ["ClusterMasking"]),
        ((kcm.BlockMasking(grid=(2, 3)), masking), ["BlockMasking", "ClusterMasking"]),
    ):
        figure = visualization.plot_masks(images, maskings)
        titles = [axis.get_title() for axis in figure.axes]
        assert titles[: len(titles) // 2] == ["image", *names]


def test_tokens_are_mixed_in(images):
    masking = kcm.ClusterMasking(
        8, embedding_weight=1.0, anchor_ratio=0.1, data_format="channels_last"
    )
    noise = np.array([[0.0, 0.5, 0.5, 0.5, 0.5, 0.5]] * 2)
    # The first patch is the anchor, the last two are most like it.
    tokens = np.array([[[1.0, 0], [0, 1], [0, 1], [0.1, 1], [1, 0.1], [1, 0.2]]] * 2)
    figure = visualization.plot_masks(
        images, masking, noise, embed=lambda _: ops.convert_to_tensor(tokens)
    )
    left_out = np.all(np.isclose(drawn(figure.axes[2]), LEFT_OUT), -1)
    np.testing.assert_array_equal(left_out[::8, ::8], [[1, 0, 0], [0, 1, 1]])


@pytest.mark.any_backend
def test_what_a_masking_needs_to_be_drawn_is_named(images):
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"`patch_size` must be given"):
        visualization.plot_masks(images, masking)
    with pytest.raises(ValueError, match=r"`images` must be known and divisible"):
        visualization.plot_masks(images, masking, patch_size=7)
    with pytest.raises(ValueError, match=r"`grid` of the CenteredMasking.*\(2, 3\)"):
        visualization.plot_masks(images, kcm.CenteredMasking(grid=(3, 2)), patch_size=8)
    last = {"data_format": "channels_last"}
    for other, message in (
        (kcm.ClusterMasking(8, min_mask_ratio=0.3, **last), "threshold .* not set"),
        (kcm.ClusterMasking(8, embedding_weight=0.5, **last), "`embed` must be giv"),
    ):
        for maskings in (other, [masking, other]):
            with pytest.raises(ValueError, match=message):
                visualization.plot_masks(images, maskings)


@pytest.mark.any_backend
def test_maskings_that_cannot_be_compared_are_refused(images):
    random = kcm.RandomMasking(0.5)
    last = kcm.ClusterMasking(8, data_format="channels_last")
    small = kcm.ClusterMasking(4, data_format="channels_last")
    first = kcm.ClusterMasking(8, data_format="channels_first")
    for maskings, options, message in (
        ([random, last, small], {}, r"one `patch_size`.*Received: .*\(4, 4\) and \(8"),
        ([random, last], {"patch_size": 4}, r"`patch_size` must.*Received: .*\(4, 4\)"),
        ([last, first], {}, r"one `data_format`.*Received: .*'channels_first' and"),
        ([], {}, r"`masking` must.*Received: masking=\[\]"),
        ({}, {}, r"`masking` must.*Received: masking={}"),
        ({"random": "random"}, {}, r"`masking` must.*Received: masking={'random'"),
        (None, {}, r"`masking` must.*Received: masking=None"),
    ):
        with pytest.raises(ValueError, match=message):
            visualization.plot_masks(images, maskings, **options)


@pytest.mark.any_backend
def test_figures_are_written(images, tmp_path):
    masking = kcm.ClusterMasking(
        patch_size=8, min_mask_ratio=0.3, threshold=0.0, data_format="channels_last"
    )
    history = {
        "loss": [2.0, 1.0],
        "val_loss": [2.0, 1.5],
        "image_to_text_accuracy": [0.1, 0.2],
        "text_to_image_accuracy": [0.1, 0.3],
    }
    for figure in (
        visualization.plot_masks(images / 255.0, masking),
        visualization.plot_history(history),
        visualization.plot_retrieval(["a", "b"], images, np.zeros((2, 2)), k=2),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.any_backend
def test_retrieval_shows_the_most_similar_images_first(images):
    figure = visualization.plot_retrieval(["query"], images, [[0.1, 0.9]], k=2)
    np.testing.assert_allclose(drawn(figure.axes[0]), images[1] / 255.0, atol=1e-6)
    assert figure.axes[0].get_title() == "0.90"


@pytest.mark.any_backend
def test_similarity_of_wrong_shape_is_named(images):
    with pytest.raises(ValueError, match=r"`similarity` .* Received: "):
        visualization.plot_retrieval(["query"], images, np.zeros((2, 1)))


@pytest.mark.any_backend
class TestMaskingStatistics:
    def axes_of(self, statistics):
        figure = visualization.plot_masking_statistics(statistics)
        return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}

    @pytest.mark.parametrize(
        "options",
        [
            {"mask_ratio": 0.5, "anchor_ratio": 0.5},
            {"min_mask_ratio": 0.2, "threshold": 0.0},
            {"min_mask_ratio": 0.2, "threshold": 1.0},
        ],
    )
    def test_are_drawn_as_they_are(self, images, options, tmp_path):
        masking = kcm.ClusterMasking(
            patch_size=8, data_format="channels_last", **options
        )
        statistics = statistics_of(masking, images)
        axes = self.axes_of(statistics)
        assert len(axes) == 5
        np.testing.assert_array_equal(
            drawn(axes["where images are masked"]), statistics.masked_by_position
        )
        ranks = axes["anchors of an image, the greediest first"]
        np.testing.assert_allclose(
            [bar.get_height() for bar in ranks.patches],
            statistics.patches_taken_by_rank,
        )
        ratios = axes["mask ratio of each image"]
        assert sum(bar.get_height() for bar in ratios.patches) == pytest.approx(1)
        mean = statistics.mask_ratio.mean()
        assert ratios.get_legend().texts[0].get_text() == f"mean {mean:.3f}"
        for axis in axes.values():
            assert axis.get_xlabel()
            assert axis.get_ylabel()
        ratios.figure.savefig(tmp_path / "figure.png")

    def test_every_ratio_and_similarity_is_within_the_histograms(self):
        statistics = kcm.masking.MaskingStatistics(
            num_images=4,
            num_kept=1,
            mask_ratio=np.array([0.0, 0.5, 0.995, 1.0], "float32"),
            masked_by_position=np.full((2, 2), 0.5),
            fill_in=0.0,
            surplus=0.0,
            similarity_at_cut=np.array([-1.0, -0.99, 1.0, np.nan], "float32"),
            cluster_sizes=np.array([0, 1, 0, 0, 1]),
            patches_taken=np.array([0, 1, 0, 0, 1]),
            patches_taken_by_rank=np.array([2.5]),
        )
        axes = self.axes_of(statistics)
        for title in ("mask ratio of each image", "similarity at the cut"):
            bars = [bar.get_height() for bar in axes[title].patches]
            assert sum(bars) == pytest.approx(1), title
        sizes = axes["clusters, and what their anchors take"]
        taken = [bar.get_height() for bar in sizes.patches[:-1]]
        assert sum(taken) == pytest.approx(1)

    def test_of_a_masking_without_clusters_are_two_panels(self, images):
        masking = kcm.RandomMasking(0.5, num_prefix_tokens=0)
        statistics = statistics_of(masking, images, patch_size=8)
        assert set(self.axes_of(statistics)) == {
            "mask ratio of each image",
            "where images are masked",
        }

    def test_of_something_else_are_refused(self):
        with pytest.raises(ValueError, match=r"`statistics` must be .*Received: "):
            visualization.plot_masking_statistics({"mask_ratio": 0.5})


# === History ===


def curves_of(figure):
    """The points of each curve, by its label."""
    return {
        line.get_label(): (line.get_xdata().tolist(), list(line.get_ydata()))
        for axis in figure.axes
        for line in axis.get_lines()
    }


def own_history(validation_freq, epochs, **options):
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile("sgd", **FAST)
    pairs = random_pairs(4)
    return model.fit(
        pairs,
        validation_data=pairs,
        validation_freq=validation_freq,
        epochs=epochs,
        batch_size=4,
        verbose=0,
        **options,
    )


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("freq", "epochs", "expected"), [(1, 2, [1, 2]), (2, 5, [2, 4]), (3, 9, [3, 6, 9])]
)
def test_validation_is_drawn_at_its_epochs(freq, epochs, expected):
    history = own_history(freq, epochs)
    curves = curves_of(visualization.plot_history(history))
    assert curves["loss, training"][0] == list(range(1, epochs + 1))
    for label, key in (
        ("loss", "loss"),
        ("image to text", "image_to_text_accuracy"),
        ("text to image", "text_to_image_accuracy"),
    ):
        points = expected, history.history[f"val_{key}"]
        assert curves[f"{label}, validation"] == points
    assert curves == curves_of(visualization.plot_history(history, freq))


@pytest.mark.any_backend
def test_epochs_are_those_of_a_run_that_begins_later():
    history = own_history(2, 7, initial_epoch=2)
    curves = curves_of(visualization.plot_history(history, validation_freq=2))
    assert curves["loss, training"][0] == [3, 4, 5, 6, 7]
    assert curves["loss, validation"][0] == [4, 6]


@pytest.mark.any_backend
def test_epochs_of_validation_that_are_not_known_must_be_given():
    history = {"loss": [4.0, 3.0, 2.0, 1.0], "val_loss": [2.0]}
    with pytest.raises(ValueError, match=r"`validation_freq` must.*Received: .*None"):
        visualization.plot_history(history)
    for freq, expected in ((3, [3]), (4, [4]), ([2], [2])):
        curves = curves_of(visualization.plot_history(history, freq))
        assert curves["loss, validation"] == (expected, [2.0])
    for freq in (1, 2, [1, 2], [], 0, "2", True):
        with pytest.raises(ValueError, match=r"`validation_freq` must.*Received: "):
            visualization.plot_history(history, freq)


@pytest.mark.any_backend
def test_the_history_of_any_keras_model_is_drawn():
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae", "accuracy"], **FAST)
    x, y = np.ones((4, 3)), np.ones((4, 2))
    history = model.fit(
        x, y, validation_data=(x, y), validation_freq=2, epochs=4, verbose=0
    )
    figure = visualization.plot_history(history)
    curves = curves_of(figure)
    assert {*curves} == {
        f"{name}, {part}"
        for name in ("loss", "mae", "accuracy")
        for part in ("training", "validation")
    }
    assert curves["mae, validation"] == ([2, 4], history.history["val_mae"])
    assert curves["mae, training"][1] == history.history["mae"]
    assert [axis.get_title() for axis in figure.axes] == ["loss", "metrics"]
    figure = visualization.plot_history({"loss": [2.0, 1.0]})
    assert len(figure.axes) == 1


@pytest.mark.any_backend
def test_metrics_that_some_epochs_lack_are_left_out():
    def report(epoch, logs):
        if epoch % 2:
            logs["at_times"] = 1.0

    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae"], **FAST)
    x, y = np.ones((4, 3)), np.ones((4, 2))
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=report)]
    history = model.fit(x, y, epochs=5, callbacks=callbacks, verbose=0)
    assert len(history.history["at_times"]) == 2
    # In any order.
    for logs in (history.history, dict(reversed(history.history.items()))):
        history.history = logs
        for given in (history, logs):
            curves = curves_of(visualization.plot_history(given))
            assert {*curves} == {"loss, training", "mae, training"}
            assert curves["loss, training"] == ([1, 2, 3, 4, 5], logs["loss"])


@pytest.mark.any_backend
@pytest.mark.parametrize("history", [{}, {"val_loss": [1.0]}, None, [1.0, 2.0]])
def test_a_history_without_epochs_is_an_error(history):
    with pytest.raises(ValueError, match=r"`history` must.*Received: "):
        visualization.plot_history(history)
