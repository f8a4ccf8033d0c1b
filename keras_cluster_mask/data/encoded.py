"""Out of Python into `tf.data`: samples as they lie in the shards, still encoded."""

import warnings

import numpy as np

from keras_cluster_mask.data.images import exif_orientation
from keras_cluster_mask.data.shards import ShardError, read_samples

try:
    import tensorflow as tf
except ImportError:
    tf = None

# Python hands samples over to C++ in chunks of so many samples, or so many bytes: it
# is never asked for a single one, and large photographs do not fill the memory.
CHUNK_SAMPLES = 64
CHUNK_BYTES = 2**23
# Enough open shards that neighbours in one seldom meet in a batch.
OPEN_SHARDS = 8
SAMPLES_TO_CHECK = 1000


def encoded_samples(
    shards, image_keys, caption_key, skipped, number, seed=None, report_read=None
):
    """A `tf.data.Dataset` of dicts of scalars, one for each pair in the shards.

    What it holds: `"image"` and `"caption"` (bytes), `"orientation"` (the EXIF number),
    and for reports on a sample `"key"`, `"shard"` (bytes) and `"pass"`, the number of
    the pass over the data that it was read in.

    Args:
        shards: list of str.
        image_keys: list of str. File extensions; the first that a sample has is used.
        caption_key: str. The file extension of captions.
        skipped: `SkippedSamples`, told of all that is left out.
        number: scalar int64 tensor. The number of the pass over the data.
        seed: scalar int64 tensor. If given, several shards are read at once, in a
            random order.
        report_read: function of the pass's number and a number of pairs. Called before
            so many pairs come.
    """
    extensions = {*image_keys, caption_key}

    def samples(shard, number):
        try:
            yield from read_samples(shard, extensions)
        except ShardError as error:
            # The last sample may be whole. If not, the shard's damage is the reason.
            if error.sample and not _pair(error.sample, image_keys, caption_key)[2]:
                yield error.sample
            skipped.report(
                number, shard, error.last_key, "damaged shard", details=str(error)
            )

    def pairs(shard, number):
        for sample in samples(shard, number):
            image, caption, fault = _pair(sample, image_keys, caption_key)
            if fault:
                skipped.report(number, shard, sample["__key__"], fault)
                continue
            yield {
                "image": image,
                "caption": caption,
                "orientation": exif_orientation(image),
                "key": sample["__key__"].encode("utf-8", "surrogateescape"),
                "shard": shard.encode("utf-8", "surrogateescape"),
                "pass": number,
            }

    def columns(chunk, number):
        if report_read is not None:
            report_read(int(number), len(chunk))
        return _columns(chunk)

    def chunks(shard, number):
        chunk = []
        for pair in pairs(shard.decode("utf-8", "surrogateescape"), int(number)):
            chunk.append(pair)
            size = sum(len(each["image"]) for each in chunk)
            if len(chunk) == CHUNK_SAMPLES or size >= CHUNK_BYTES:
                yield columns(chunk, number)
                chunk = []
        if chunk:
            yield columns(chunk, number)

    signature = {
        name: tf.TensorSpec((None,), dtype) for name, dtype in _COLUMN_TYPES.items()
    }

    def read(shard):
        return tf.data.Dataset.from_generator(
            chunks, args=(shard, number), output_signature=signature
        )

    dataset = tf.data.Dataset.from_tensor_slices(shards)
    if seed is not None:
        dataset = dataset.shuffle(len(shards), seed, reshuffle_each_iteration=False)
    return dataset.interleave(
        read,
        cycle_length=min(OPEN_SHARDS, len(shards)) if seed is not None else 1,
        block_length=1,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    ).unbatch()


_COLUMN_TYPES = {
    "image": "string",
    "caption": "string",
    "orientation": "int32",
    "key": "string",
    "shard": "string",
    "pass": "int64",
}


def _columns(chunk):
    # Bytes as objects: NumPy's own strings lose zeros at their end.
    return {
        name: np.array(
            [each[name] for each in chunk], object if dtype == "string" else dtype
        )
        for name, dtype in _COLUMN_TYPES.items()
    }


def _pair(sample, image_keys, caption_key):
    """The image, the caption, and what is wrong with them if anything is."""
    image = next((sample[key] for key in image_keys if key in sample), None)
    caption = sample.get(caption_key)
    fault = None
    if image is None:
        fault = "no image"
    elif caption is None:
        fault = "no caption"
    elif not caption.strip():
        fault = "empty caption"
    return image, caption, fault


def count_pairs(shards, image_keys, caption_key):
    """The number of pairs in shards, whether or not their pictures decode."""
    warnings.warn(
        f"Counting the pairs in {len(shards)} shards: an epoch starts with what was "
        "left of the one before, which has not been read to its end.",
        stacklevel=2,
    )
    extensions = {*image_keys, caption_key}
    count = 0
    for shard in shards:
        try:
            for sample in read_samples(shard, extensions):
                count += _pair(sample, image_keys, caption_key)[2] is None
        except ShardError as error:
            sample = error.sample
            count += bool(sample) and _pair(sample, image_keys, caption_key)[2] is None
    return count


def check_for_pairs(shards, image_keys, caption_key, on_error, at_least=1):
    """Raises an error unless the shards hold pairs, and enough of them for a batch.

    Args:
        shards: list of str.
        image_keys: list of str.
        caption_key: str.
        on_error: `"skip"`, or `"raise"` for the first damaged shard.
        at_least: int. How many pairs there must be; no more are looked at.
    """
    seen = {}
    damage = None
    looked_at = pairs = 0
    for shard in shards:
        try:
            for sample in read_samples(shard):
                looked_at += 1
                pairs += _pair(sample, image_keys, caption_key)[2] is None
                if pairs >= at_least:
                    return
                seen.update(sample)
                if not pairs and looked_at >= SAMPLES_TO_CHECK:
                    break
        except ShardError as error:
            if on_error == "raise":
                raise
            damage = damage or error
        if not pairs and looked_at >= SAMPLES_TO_CHECK:
            break
    if pairs:
        raise ValueError(
            "`batch_size` must not exceed the number of pairs, or no batch is ever "
            f"full. Received: batch_size={at_least} and {pairs} pairs in `source`"
        )
    if damage:
        raise ValueError(f"`source` holds no readable pair. {damage}") from damage
    extensions = sorted(seen.keys() - {"__key__"})
    raise ValueError(
        "`source` must hold samples with an image (`image_keys`, here "
        f"{list(image_keys)}) and a caption (`caption_key`, here {caption_key!r}) that "
        f"is not empty. Received: {looked_at} samples with the extensions {extensions} "
        f"from {shards[0]}" + (f" and {len(shards) - 1} more" if shards[1:] else "")
    )
