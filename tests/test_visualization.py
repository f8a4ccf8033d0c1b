import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import visualization
from tests.helpers import FAST, image_mlp, random_pairs, text_bag


def statistics_of(masking, images, **options):
    return kcm.masking.masking_statistics(masking, images, verbose=0, **options)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype("uint8")


def drawn(axis):
    return axis.get_images()[0].get_array()


def test_mask_images_gray_out_what_the_masking_leaves_out(images):
    masking = kcm.ClusterMasking(
        patch_size=8, mask_ratio=0.5, data_format="channels_last"
    )
    noise = np.random.default_rng(1).random((2, 6)).astype("float32")
    figure = visualization.plot_masks(images, masking, noise=noise)
    axes = np.reshape(figure.axes[:10], (2, 5))
    indices, _ = masking.select(images, noise=noise)
    for row, kept in zip(axes, ops.convert_to_numpy(indices)):
        original, masked = drawn(row[0]), drawn(row[2])
        for patch in range(6):
            rows = slice(patch // 3 * 8, patch // 3 * 8 + 8)
            columns = slice(patch % 3 * 8, patch % 3 * 8 + 8)
            same = np.array_equal(original[rows, columns], masked[rows, columns])
            assert same == (patch in kept)


@pytest.mark.any_backend
def test_random_masking_beside_it_has_the_same_budget(images):
    masking = kcm.ClusterMasking(
        patch_size=8, mask_ratio=0.5, data_format="channels_last"
    )
    figure = visualization.plot_masks(images, masking)
    left_out = [
        np.mean(np.all(np.isclose(drawn(axis), visualization.LEFT_OUT), axis=-1))
        for axis in figure.axes[1:3]
    ]
    assert left_out == [0.5, 0.5]


@pytest.mark.any_backend
def test_of_another_masking_the_image_and_what_is_left_of_it_are_shown(images):
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    figure = visualization.plot_masks(images, masking, patch_size=8, seed=3)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["image", "RandomMasking"]
    noise = np.random.default_rng(3).random((2, 6))
    for row, scores in zip(np.reshape(figure.axes, (2, 2)), noise):
        original, masked = drawn(row[0]), drawn(row[1])
        for patch in range(6):
            rows = slice(patch // 3 * 8, patch // 3 * 8 + 8)
            columns = slice(patch % 3 * 8, patch % 3 * 8 + 8)
            same = np.array_equal(original[rows, columns], masked[rows, columns])
            assert same == (patch in np.argsort(scores)[3:])


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
    left_out = np.all(np.isclose(drawn(figure.axes[2]), visualization.LEFT_OUT), -1)
    np.testing.assert_array_equal(left_out[::8, ::8], [[1, 0, 0], [0, 1, 1]])


@pytest.mark.any_backend
def test_what_a_masking_needs_to_be_drawn_is_named(images):
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"`patch_size` must be given"):
        visualization.plot_masks(images, masking)
    with pytest.raises(ValueError, match=r"`images` must be known and divisible"):
        visualization.plot_masks(images, masking, patch_size=7)
    masking = kcm.ClusterMasking(8, min_mask_ratio=0.3, data_format="channels_last")
    with pytest.raises(ValueError, match=r"threshold .* not set"):
        visualization.plot_masks(images, masking)
    masking = kcm.ClusterMasking(8, embedding_weight=0.5, data_format="channels_last")
    with pytest.raises(ValueError, match=r"`embed` must be given"):
        visualization.plot_masks(images, masking)


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
