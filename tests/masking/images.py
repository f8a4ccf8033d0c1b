"""Images, noise and comparisons that the masking tests share, from seeded NumPy."""

import keras
import ml_dtypes
import numpy as np
from keras import ops
from scipy import stats

# Two backends must agree on a selection where the decision is clearer than this.
CLEAR = 2.0**-11
# The probability that `chi_square` finds less where all chances are equal.
FALSE_ALARM = 1e-6
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def numpy(*tensors):
    """Tensors of the running backend as arrays."""
    arrays = tuple(ops.convert_to_numpy(tensor) for tensor in tensors)
    return arrays[0] if len(arrays) == 1 else arrays


def draw_noise(rng, batch, num_patches):
    """Noise as `draw` makes it, without its ties: they would test the tie-break."""
    steps = np.stack([rng.permutation(2**16)[:num_patches] for _ in range(batch)])
    return (steps / 2**16).astype("float32")


def tokens_of(batch, num_tokens, dim=6, dtype="float32", seed=0):
    values = np.random.default_rng(seed).normal(size=(batch, num_tokens, dim))
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def ramp(steps=4):
    """An `embedding_weight` from 0 to 1."""
    return keras.optimizers.schedules.PolynomialDecay(0.0, steps, 1.0)


def textured(rng, batch, height, width, channels, dtype="float32", fmt=None):
    """Images of smooth shapes under grain; every patch has texture."""
    coarse = rng.random((batch, -(-height // 6), -(-width // 6), channels))
    smooth = coarse.repeat(6, axis=1).repeat(6, axis=2)[:, :height, :width]
    grain = rng.random((batch, height, width, channels))
    share = rng.uniform(0.2, 1.0, (batch, 1, 1, 1))
    return as_images((1.0 - share) * smooth + share * grain, dtype, fmt)


def as_images(values, dtype="float32", fmt=None):
    """Values in [0, 1], channels last, as images of a dtype and data format."""
    if fmt == "channels_first":
        values = np.moveaxis(values, -1, 1)
    if dtype == "uint8":
        return np.round(values * 255.0).astype("uint8")
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def mosaic(rng, batch, rows, columns, patch_size, channels=3):
    """Images of repeated tiles, any two of which are alike by 1, 0 or -1.

    Patch sides must be multiples of 4.
    """
    height, width = patch_size
    i, j = np.mgrid[:height, :width]
    stripes, bars, checks = i % 2, j % 2, (i + j) % 2
    tiles = np.stack([stripes, bars, 1 - bars, checks, i * 0, i * 0 + 1])
    choice = rng.integers(0, len(tiles), (batch, rows, columns))
    images = tiles[choice].transpose(0, 1, 3, 2, 4)
    images = images.reshape(batch, rows * height, columns * width, 1)
    return images.repeat(channels, axis=-1).astype("float32")


def paper(rng, batch, rows, columns, patch_size, channels=3, levels=(0.0, 1.0)):
    """Gray images whose every patch is flat, each at a level of its own."""
    height, width = patch_size
    level = rng.uniform(*levels, (batch, rows, columns, 1)).repeat(channels, axis=-1)
    images = level.repeat(height, axis=1).repeat(width, axis=2)
    return images.astype("float32")


def photographs(height, width, count):
    """`count` uint8 crops of photographs that scikit-image ships."""
    from skimage import data

    rng = np.random.default_rng(0)
    sources = [getattr(data, name)()[::2, ::2] for name in PHOTOGRAPHS]
    crops = []
    for index in range(count):
        source = sources[index % len(sources)]
        top = rng.integers(0, source.shape[0] - height + 1)
        left = rng.integers(0, source.shape[1] - width + 1)
        crops.append(source[top : top + height, left : left + width])
    return np.stack(crops)


def compiled_select(masking):
    """`masking.select` for given noise, compiled on JAX.

    There it takes less time than compiling operation by operation.
    """
    if keras.backend.backend() != "jax":
        return masking.select
    import jax

    return jax.jit(masking.select)


def compiled_step(masking):
    """A compiled step that trains a dense layer before a masking of 24 patches."""
    tokens, images = keras.Input((25, 6)), keras.Input((32, 48, 3))
    kept = masking(keras.layers.Dense(6)(tokens), images=images, training=True)
    pooled = keras.layers.GlobalAveragePooling1D()(kept)
    model = keras.Model((tokens, images), pooled)
    model.compile("sgd", "mse")
    inputs = [tokens_of(48, 25), photographs(32, 48, 48).astype("float32")]
    return lambda: model.train_on_batch(inputs, np.zeros((48, 6), "float32"))


def assert_selects(masking, expected, rows=None, compiled=False, **inputs):
    """Asserts that `select` gives the expected selection, in the rows that count."""
    select = compiled_select(masking) if compiled else masking.select
    indices, visible = numpy(*select(**inputs))
    assert indices.dtype == np.int32
    assert visible.dtype == bool
    rows = slice(None) if rows is None else rows
    np.testing.assert_array_equal(indices[rows], expected[0][rows])
    np.testing.assert_array_equal(visible[rows], expected[1][rows])


def chi_square(counts, draws, kept):
    """p-value of equal chances, of counts of `draws` times `kept` of all patches."""
    num_patches = len(counts)
    share = kept / num_patches
    variance = draws * share * (1.0 - share) * num_patches / (num_patches - 1)
    statistic = np.sum((counts - draws * share) ** 2) / variance
    return stats.chi2.sf(statistic, num_patches - 1)


def output_mask(tensor):
    """The Keras mask that a layer's output carries, or `None`."""
    mask = getattr(tensor, "_keras_mask", None)
    return None if mask is None else numpy(mask)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)
