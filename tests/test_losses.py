import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_cluster_mask import losses
from keras_cluster_mask.models.head import l2_normalize

BATCH, WIDTH = 12, 16


def embeddings(seed=0, batch=BATCH, width=WIDTH):
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(2, batch, width))
    pair[1] += 0.5 * pair[0]
    pair /= np.linalg.norm(pair, axis=-1, keepdims=True)
    return pair.astype("float32")


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def positives_of(labels, batch=BATCH):
    if labels is None:
        return np.eye(batch)
    labels = np.asarray(labels).reshape(batch, -1)
    return (labels[:, None] == labels[None]).all(axis=-1).astype("float64")


def softmax_reference(images, texts, scale, labels=None):
    logits = scale * images.astype("float64") @ texts.astype("float64").T
    positives = positives_of(labels, len(images))
    targets = positives / positives.sum(axis=1, keepdims=True)
    rows = -(targets * log_softmax(logits)).sum(axis=1).mean()
    columns = -(targets * log_softmax(logits.T)).sum(axis=1).mean()
    return (rows + columns) / 2


def sigmoid_reference(images, texts, scale, bias, labels=None):
    logits = scale * images.astype("float64") @ texts.astype("float64").T + bias
    signs = 2 * positives_of(labels, len(images)) - 1
    return np.logaddexp(0.0, -signs * logits).sum() / len(images)


LABELS = {
    "none": None,
    "flat": np.array([0, 1, 2, 0, 4, 5, 1, 0, 8, 9, 10, 11], "int32"),
    "rows": np.random.default_rng(1).integers(0, 2, (BATCH, 3)).astype("int32"),
    "all_equal": np.zeros(BATCH, "int32"),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_softmax_is_the_plain_formula(labels, scale):
    images, texts = embeddings()
    got = losses.softmax_contrastive_loss(images, texts, scale, LABELS[labels])
    expected = softmax_reference(images, texts, scale, LABELS[labels])
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=2e-5)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -20.0)])
def test_sigmoid_is_the_plain_formula(labels, scale, bias):
    images, texts = embeddings()
    got = losses.sigmoid_contrastive_loss(images, texts, scale, bias, LABELS[labels])
    expected = sigmoid_reference(images, texts, scale, bias, LABELS[labels])
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_those_of_open_clip(seed):
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip.loss")
    images, texts = embeddings(seed)
    pair = torch.tensor(images), torch.tensor(texts)
    softmax = losses.softmax_contrastive_loss(images, texts, 14.3)
    expected = float(open_clip.ClipLoss()(*pair, 14.3))
    np.testing.assert_allclose(ops.convert_to_numpy(softmax), expected, rtol=1e-5)
    sigmoid = losses.sigmoid_contrastive_loss(images, texts, 10.0, -10.0)
    expected = float(open_clip.SigLipLoss()(*pair, 10.0, -10.0))
    np.testing.assert_allclose(ops.convert_to_numpy(sigmoid), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    half = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    images, texts = (x.astype(half) for x in embeddings())
    exact = images.astype("float32"), texts.astype("float32")
    softmax = losses.softmax_contrastive_loss(images, texts, 100.0)
    sigmoid = losses.sigmoid_contrastive_loss(images, texts, 100.0, -10.0)
    for got, expected in (
        (softmax, softmax_reference(*exact, 100.0)),
        (sigmoid, sigmoid_reference(*exact, 100.0, -10.0)),
    ):
        assert keras.backend.standardize_dtype(got.dtype) == "float32"
        assert got.shape == ()
        np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=2e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", ["none", "flat"])
def test_gradients_are_finite_even_at_zero_vectors_and_right(loss, labels):
    images, texts = embeddings()
    images[0], texts[3] = 0.0, 0.0

    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.images = self.add_weight(shape=images.shape, name="images")
            self.texts = self.add_weight(shape=texts.shape, name="texts")
            self.images.assign(images)
            self.texts.assign(texts)

        def call(self, inputs):
            pair = (
                l2_normalize(ops.convert_to_tensor(x))
                for x in (self.images, self.texts)
            )
            if loss == "softmax":
                value = losses.softmax_contrastive_loss(*pair, 20.0, LABELS[labels])
            else:
                value = losses.sigmoid_contrastive_loss(
                    *pair, 10.0, -10.0, LABELS[labels]
                )
            return value + 0.0 * ops.sum(inputs)

    def reference(images):
        def normalize(x):
            return x / np.sqrt(np.maximum((x * x).sum(axis=-1, keepdims=True), 1e-12))

        pair = normalize(images.astype("float64")), normalize(texts.astype("float64"))
        if loss == "softmax":
            return softmax_reference(*pair, 20.0, LABELS[labels])
        return sigmoid_reference(*pair, 10.0, -10.0, LABELS[labels])

    model = Pair()
    model.compile(keras.optimizers.SGD(1.0), loss=lambda _, value: value)
    model.train_on_batch(np.zeros((1, 1), "float32"), np.zeros((1,), "float32"))
    for weight in model.weights[:2]:
        assert np.isfinite(ops.convert_to_numpy(weight.value)).all()
    gradient = images - ops.convert_to_numpy(model.images.value)
    assert np.abs(gradient[0]).max() > 0.0
    for row, column in ((1, 0), (5, 3), (11, 15)):
        shift = np.zeros(images.shape)
        shift[row, column] = 1e-5
        numeric = (reference(images + shift) - reference(images - shift)) / 2e-5
        np.testing.assert_allclose(gradient[row, column], numeric, atol=1e-4, rtol=1e-3)


SHAPES = {
    "the same width": ((4, 8), (4, 6)),
    "the same batch size": ((4, 8), (5, 8)),
    "must have shape": ((4, 8, 1), (4, 8)),
    "`labels`": ((4, 8), (4, 8), (4, 2, 2)),
    "`labels` must have": ((4, 8), (4, 8), (3,)),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("match", SHAPES)
def test_shapes_that_do_not_fit_are_refused(match):
    images, texts, *labels = (np.ones(shape, "float32") for shape in SHAPES[match])
    for loss in (
        lambda: losses.softmax_contrastive_loss(images, texts, 1.0, *labels),
        lambda: losses.sigmoid_contrastive_loss(images, texts, 1.0, 0.0, *labels),
    ):
        with pytest.raises(ValueError, match=rf"{match}.*Received: .*shape="):
            loss()
