from types import SimpleNamespace

import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import visualization
from keras_cluster_mask.visualization.image_plots import _for_display
from tests.helpers import compiled_model, random_noise, random_pairs, tiny_clip

pytestmark = pytest.mark.any_backend

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype("uint8")
NOISE = np.random.default_rng(1).random((2, 6)).astype("float32")


def clusters(patch_size=8, data_format="channels_last", **options):
    return kcm.ClusterMasking(patch_size=patch_size, data_format=data_format, **options)


def drawn(axis):
    return axis.get_images()[0].get_array()


def shown_patches(original, masked, side=8):
    """The patches that an axis shows as another one does."""
    same = np.all(np.isclose(drawn(original), drawn(masked)), axis=-1)
    rows, columns = same.shape[0] // side, same.shape[1] // side
    return np.flatnonzero(same.reshape(rows, side, columns, side).all(axis=(1, 3)))


# === Masks ===


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_levels_of_any_type_are_shown_as_those_of_uint8(dtype):
    figure = visualization.plot_masks(IMAGES.astype(dtype), clusters(), noise=NOISE)
    np.testing.assert_allclose(drawn(figure.axes[0]), IMAGES[0] / 255, atol=1e-6)


def test_a_seed_draws_the_noise():
    figure = visualization.plot_masks(IMAGES, kcm.RandomMasking(), None, 3, 8)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["image", "RandomMasking"]
    noise = np.random.default_rng(3).random((2, 6))
    given = visualization.plot_masks(IMAGES, kcm.RandomMasking(), noise, patch_size=8)
    for found, expected in zip(figure.axes, given.axes):
        np.testing.assert_array_equal(drawn(found), drawn(expected))


def test_maskings_are_compared_on_the_same_images_and_noise():
    maskings = {
        "at random": kcm.RandomMasking(0.5),
        "the same": kcm.RandomMasking(0.5, num_prefix_tokens=1),
        "center": kcm.CenteredMasking(0.5, grid=(2, 3)),
        "clusters": clusters(anchor_ratio=0.2),
        "by threshold": clusters(min_mask_ratio=0.3, threshold=0.0, anchor_ratio=0.2),
    }
    figure = visualization.plot_masks(IMAGES, maskings, NOISE)
    assert [axis.get_title() for axis in figure.axes[:6]] == ["image", *maskings]
    for index, row in enumerate(np.reshape(figure.axes, (2, 6))):
        np.testing.assert_allclose(drawn(row[0]), IMAGES[index] / 255.0, atol=1e-6)
        for axis, masking in zip(row[1:], maskings.values()):
            masking.num_prefix_tokens = 0
            selected = masking.select(IMAGES, ops.zeros((2, 6, 1)), NOISE)
            kept, visible = (ops.convert_to_numpy(x)[index] for x in selected)
            np.testing.assert_array_equal(shown_patches(row[0], axis), kept[visible])


def test_tokens_are_mixed_in():
    masking = clusters(embedding_weight=1.0)
    tokens = np.random.default_rng(2).normal(size=(2, 6, 4)).astype("float32")
    model = SimpleNamespace(
        image_tower=SimpleNamespace(prepare=lambda images: images),
        image_encoder=SimpleNamespace(embed_patches=lambda images: tokens),
    )
    figure = visualization.plot_masks(IMAGES, masking, NOISE, model=model)
    kept, _ = masking.select(IMAGES, tokens, NOISE)
    for row, indices in zip(np.reshape(figure.axes, (2, 2)), kept):
        np.testing.assert_array_equal(
            shown_patches(*row), ops.convert_to_numpy(indices)
        )


def test_a_model_prepares_images_and_knows_the_size_of_patches():
    masking = kcm.ClusterMasking(0.5)
    images = random_pairs(2)["images"]
    # Channels that the statistics of CLIP weigh differently.
    images = images // np.array([1, 3, 9], "uint8")
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(), masking=masking)
    noise = random_noise(2)
    figure = visualization.plot_masks(images, masking, noise, model=model)
    as_floats = visualization.plot_masks(images / 255, masking, noise, model=model)
    for axis, other in zip(figure.axes, as_floats.axes):
        np.testing.assert_allclose(drawn(axis), drawn(other), atol=1e-6)
    normalized = model.image_tower.prepare(images)
    kept, _ = kcm.ClusterMasking(0.5, patch_size=4).select(normalized, noise=noise)
    for row, indices in zip(np.reshape(figure.axes, (2, 2)), kept):
        np.testing.assert_array_equal(
            shown_patches(*row, 4), ops.convert_to_numpy(indices)
        )


@pytest.mark.parametrize(
    ("masking", "patch_size", "argument"),
    [
        (kcm.RandomMasking(0.5), None, "patch_size"),
        (kcm.RandomMasking(0.5), 7, "images"),
        (clusters(min_mask_ratio=0.3), None, "threshold"),
        (clusters(embedding_weight=0.5), None, "tokens"),
        ({"one": clusters(), "other": clusters(4)}, None, "patch_size"),
        ({"one": kcm.RandomMasking(0.5), "other": clusters()}, 4, "patch_size"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(masking, patch_size, argument):
    with pytest.raises(ValueError, match=rf"`{argument}`[\s\S]*Received: "):
        visualization.plot_masks(IMAGES, masking, patch_size=patch_size)


# === Retrieval ===


def test_retrieval_shows_queries_as_they_are_and_the_most_similar_images_first(
    tmp_path,
):
    # Dollar signs are no formula.
    query = r"a $5 bill and a price of $\x$"
    figure = visualization.plot_retrieval([query], IMAGES, [[0.1, 0.9]], k=2)
    axis = figure.axes[0]
    np.testing.assert_allclose(drawn(axis), IMAGES[1] / 255.0, atol=1e-6)
    assert axis.get_title() == "0.90"
    (text,) = axis.texts
    assert (text.get_text(), text.get_parse_math()) == (query, False)
    figure.savefig(tmp_path / "figure.png")


def test_similarity_of_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"`similarity` .*Received: similarity"):
        visualization.plot_retrieval(["query"], IMAGES, np.zeros((2, 1)))


# === History ===


HISTORY = {"loss": [3.0, 2.0], "accuracy": [0.1, 0.3]}


def curves_of(figure):
    """The points of each curve, by its label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axis in figure.axes
        for line in axis.get_lines()
    }


@pytest.mark.parametrize(
    ("freq", "initial_epoch", "expected"),
    [(1, 0, [1, 2, 3, 4, 5]), (2, 2, [4]), ([1, 5], 0, [1, 5])],
)
def test_history_is_drawn_with_validation_at_its_epochs(freq, initial_epoch, expected):
    pairs = random_pairs(4)
    history = compiled_model().fit(
        pairs,
        validation_data=pairs,
        validation_freq=freq,
        epochs=5,
        initial_epoch=initial_epoch,
        batch_size=4,
        verbose=0,
    )
    curves = curves_of(visualization.plot_history(history, freq))
    epochs = list(range(initial_epoch + 1, 6))
    for key in HISTORY:
        assert curves[f"{key}, training"] == (epochs, history.history[key])
        points = expected, history.history[f"val_{key}"]
        assert curves[f"{key}, validation"] == points


@pytest.mark.parametrize("freq", [1, 0, [1, 2]])
def test_a_frequency_of_another_run_is_refused(freq):
    with pytest.raises(ValueError, match=r"`validation_freq`.*Received: "):
        visualization.plot_history({**HISTORY, "val_loss": [3.0]}, freq)


@pytest.mark.parametrize(
    ("logs", "titles"),
    [
        (["loss"], ["contrastive loss"]),
        (["loss", "val_text_to_image_recall@1"], ["contrastive loss", "recall"]),
        ([*HISTORY], ["contrastive loss", "accuracy within the batch"]),
    ],
)
def test_metrics_that_a_run_does_not_have_are_not_drawn(logs, titles):
    history = {name: [0.5, 2.5] for name in logs}
    figure = visualization.plot_history(history)
    assert [axis.get_title() for axis in figure.axes] == titles
    assert len(curves_of(figure)) == len(logs)
    for axis in figure.axes:
        assert (axis.get_ylim() == (0, 1)) == ("accuracy" in axis.get_title())


@pytest.mark.parametrize("history", [{}, {"val_own": [0.5]}])
def test_a_history_without_a_metric_to_plot_is_refused(history):
    with pytest.raises(ValueError, match=r"`history` must have.*Received: metrics \["):
        visualization.plot_history(history)


def test_history_shows_recall_and_chance():
    name = "image_to_text_recall@10"
    # Both directions have nearly the same number of candidates.
    other = "text_to_image_recall@10"
    chance = {"loss": np.log(64), name: 0.1, other: 0.1001}
    figure = visualization.plot_history(
        {**HISTORY, f"val_{name}": [0.2, 0.3], f"val_{other}": [0.2, 0.3]},
        chance=chance,
    )
    assert curves_of(figure)["image to text recall@10"] == ([1, 2], [0.2, 0.3])
    loss, accuracy, recall = figure.axes
    assert loss.get_lines()[-1].get_ydata() == [np.log(64)] * 2
    assert "chance" not in str(accuracy.get_legend_handles_labels()[1])
    *_, line = recall.get_lines()
    assert line.get_ydata() == pytest.approx([0.1] * 2, abs=1e-3)
    labels = recall.get_legend_handles_labels()[1]
    assert [x for x in labels if "chance" in x] == ["chance, 0.1"]
    # Of a run that was resumed with another callback.
    figure = visualization.plot_history({**HISTORY, f"val_{name}": [0.3]})
    assert curves_of(figure)["image to text recall@10"] == ([2], [0.3])


def test_gray_images_in_any_format_are_shown_with_three_channels():
    levels = np.linspace(0, 1, 2 * 16 * 16, dtype="float32").reshape(2, 1, 16, 16)
    shown = _for_display(levels, "channels_first")
    np.testing.assert_array_equal(shown, np.stack([levels[:, 0]] * 3, axis=-1))
