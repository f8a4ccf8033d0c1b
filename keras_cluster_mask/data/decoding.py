"""From encoded samples to pictures, and what becomes of those that do not decode."""

import numpy as np

try:
    import tensorflow as tf
except ImportError:
    tf = None

# Errors are caught for so many images at once: for each by itself costs more than
# decoding a small one.
GROUP = 16


def decoded_samples(samples, prepare, image_shape, skipped, keep_places):
    """A dataset of samples whose pictures are decoded, in parallel.

    Args:
        samples: A dataset of tuples of an encoded sample and its seed.
        prepare: Function of an image's bytes, its orientation and a seed that returns
            the picture, or raises.
        image_shape: tuple. The shape of the pictures, which are uint8.
        skipped: `SkippedSamples`, told of pictures that do not decode.
        keep_places: bool. Whether these leave a gap, which `fill_gaps` fills, or are
            left out.

    Returns:
        A dataset of dicts of `"image"`, `"caption"`, `"key"` and `"pass"`, and with
        `keep_places` a bool, `"decodes"`.
    """

    def report(decoded, numbers, shards, keys):
        for lost in sorted({*range(len(keys))} - {*decoded.tolist()}):
            skipped.report(
                numbers[lost], shards[lost], keys[lost], "the image does not decode"
            )
        return np.int32(len(keys) - len(decoded))

    def decode(samples, seeds):
        decoded, pictures = _map_what_works(
            prepare,
            (samples["image"], samples["orientation"], seeds),
            tf.TensorSpec(image_shape, "uint8"),
        )
        place = [decoded, samples["pass"], samples["shard"], samples["key"]]
        lost = tf.cond(
            tf.size(decoded) < tf.size(seeds),
            lambda: tf.ensure_shape(tf.numpy_function(report, place, "int32"), ()),
            lambda: 0,
        )
        with tf.control_dependencies([lost]):
            decoded = tf.identity(decoded)
        columns = {name: samples[name] for name in ("caption", "key", "pass")}
        if not keep_places:
            columns = {name: tf.gather(x, decoded) for name, x in columns.items()}
            return {**columns, "image": pictures}
        rows = tf.size(seeds, out_type="int64")[None]
        shape = tf.concat([rows, image_shape], 0)
        pictures = tf.scatter_nd(decoded[:, None], pictures, shape)
        works = tf.scatter_nd(decoded[:, None], tf.ones_like(decoded, "bool"), rows)
        return {
            **columns,
            "image": tf.ensure_shape(pictures, (None, *image_shape)),
            "decodes": works,
        }

    decoded = samples.batch(GROUP).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return decoded.unbatch()


def fill_gaps(columns):
    """Takes, in place of each sample of a batch that does not decode, its neighbour."""
    columns = dict(columns)
    decodes = columns.pop("decodes")
    places = tf.where(decodes)[:, 0]

    def filled():
        wanted = tf.range(tf.size(decodes, out_type="int64"))
        neighbour = tf.searchsorted(places, wanted, side="right", out_type="int64") - 1
        chosen = tf.gather(places, tf.maximum(neighbour, 0))
        return {name: tf.gather(x, chosen) for name, x in columns.items()}

    any_works = tf.debugging.assert_positive(
        tf.size(places), "None of the pictures of a batch decodes."
    )
    with tf.control_dependencies([any_works]):
        decodes = tf.identity(decodes)
    return tf.cond(tf.reduce_all(decodes), lambda: columns, filled)


def _map_what_works(function, columns, output):
    """The places where `function` of a row raises nothing, and its results there.

    A graph has no `try`, but a dataset can drop what raises.
    """
    rows = tf.data.Dataset.from_tensor_slices(columns).enumerate()
    results = rows.map(lambda place, row: (place, function(*row))).ignore_errors()
    nothing = tf.data.Dataset.from_tensors(
        (tf.zeros((0,), "int64"), tf.zeros((0, *output.shape), output.dtype))
    )
    return results.batch(GROUP).concatenate(nothing).take(1).get_single_element()
