import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import visualization


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype("uint8")


def drawn(axis):
    return axis.get_images()[0].get_array()


def test_mask_pictures_gray_out_what_the_masking_leaves_out(images):
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


def test_retrieval_shows_the_most_similar_pictures_first(images):
    figure = visualization.plot_retrieval(["query"], images, [[0.1, 0.9]], k=2)
    np.testing.assert_allclose(drawn(figure.axes[0]), images[1] / 255.0, atol=1e-6)
    assert figure.axes[0].get_title() == "0.90"


def test_similarity_of_wrong_shape_is_named(images):
    with pytest.raises(ValueError, match=r"`similarity` .* Received: "):
        visualization.plot_retrieval(["query"], images, np.zeros((2, 1)))
