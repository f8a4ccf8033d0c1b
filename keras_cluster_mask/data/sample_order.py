"""Which samples a process takes, in which order: in evaluation, and in training."""

import numpy as np

from keras_cluster_mask.data.position import KEPT, READ

try:
    import tensorflow as tf
except ImportError:
    tf = None

EPOCH_STRIDE = 1_000_003


def evaluation_samples(read, skipped, seed, process):
    """All samples in the order of the files, or a process's share of them.

    Args:
        read: `read(number, seed)`, a dataset of the samples of one pass, still encoded;
            in the order of the files if `seed` is `None`.
        skipped: `SkippedSamples`.
        seed: int. The seed of what is drawn for each sample.
        process: pair of ints. The number of this process, and how many there are.

    Returns:
        A dataset of tuples of a sample and a seed of its own.
    """
    index, count = process

    def start():
        # Runs, and so counts, whenever an iterator starts to read.
        yield skipped.start_pass()

    @tf.autograph.experimental.do_not_convert
    def samples(number):
        tf.random.set_seed(1)
        seeds = tf.data.Dataset.random(seed + 2)
        return tf.data.Dataset.zip(read(number, None), seeds).shard(count, index)

    signature = tf.TensorSpec((), "int64")
    return tf.data.Dataset.from_generator(start, output_signature=signature).flat_map(
        samples
    )


def training_samples(read, skipped, position, process, shuffle_buffer, whole=True):
    """Epoch after epoch in orders of their own, or a process's share of them.

    Processes take consecutive parts of each batch, as devices of one process do.

    Args:
        read: As for `evaluation_samples`; in an order that depends on `seed`.
        skipped: `SkippedSamples`.
        position: `Position`.
        process: pair of ints. The number of this process, and how many there are.
        shuffle_buffer: int. How many samples the shuffle holds.
        whole: bool. Whether batches are whole, and what does not fill one opens the
            next epoch.

    Returns:
        A dataset of tuples of a sample and a seed of its own.
    """
    index, count = process
    batch_size = position.batch_size
    own_size = batch_size // count

    def start():
        # Runs, and so counts and moves on, whenever an iterator starts to read.
        number = skipped.start_pass()
        for part in position.start_pass(number):
            yield number, *part

    def ordered(number, epoch):
        own_seed = position.seed + epoch * EPOCH_STRIDE
        samples = read(number, own_seed)
        if shuffle_buffer > 1:
            samples = samples.shuffle(
                shuffle_buffer, own_seed + 1, reshuffle_each_iteration=False
            )
        return tf.data.Dataset.zip(samples, tf.data.Dataset.random(own_seed + 2))

    @tf.autograph.experimental.do_not_convert
    def part(number, epoch, leave_out, way):
        # What comes in an epoch depends on its number and the dataset's seed alone: not
        # on what was read before, nor on TensorFlow's global seed.
        tf.random.set_seed(1)  # Of the graph of this function alone.
        reported = tf.where(way == READ, number, -1)
        samples = ordered(reported, epoch).skip(leave_out)
        kept = tf.data.Dataset.from_generator(
            lambda way: [position.left_over()] if way == KEPT else [],
            args=(way,),
            output_signature=_several(samples.element_spec),
        ).unbatch()
        count = tf.where(way == KEPT, tf.constant(0, "int64"), -1)
        samples = kept.concatenate(samples.take(count))
        samples = samples.map(lambda sample, seed: ({**sample, "pass": number}, seed))
        # Of no samples; there to be run when those before have all been read.
        end = tf.data.Dataset.from_generator(
            lambda number: position.report_end(int(number)) or (),
            args=(reported,),
            output_signature=samples.element_spec,
        )
        return samples.concatenate(end)

    def forget(place, row):
        # The bytes of what other processes take; the rest shows when a batch is full.
        sample, seed = row
        own = place % batch_size // own_size == index
        return {**sample, "image": tf.where(own, sample["image"], "")}, seed

    def is_full(*columns):
        def keep(*values):
            sample, seed = tf.nest.pack_sequence_as(columns, values)
            position.keep(int(sample["pass"][0]), (sample, seed))
            return np.False_

        return tf.cond(
            tf.size(columns[1]) == batch_size,
            lambda: True,
            lambda: tf.ensure_shape(
                tf.numpy_function(keep, tf.nest.flatten(columns), "bool"), ()
            ),
        )

    def own_rows(*columns):
        own = slice(index * own_size, (index + 1) * own_size)
        return tf.nest.map_structure(lambda column: column[own], columns)

    samples = tf.data.Dataset.from_generator(
        start, output_signature=(tf.TensorSpec((), "int64"),) * 4
    ).flat_map(part)
    if not whole:
        return samples
    if count > 1:
        samples = samples.enumerate().map(forget)
    samples = samples.batch(batch_size).filter(is_full)
    if count > 1:
        samples = samples.map(own_rows)
    return samples.unbatch()


def _several(spec):
    return tf.nest.map_structure(
        lambda each: tf.TensorSpec((None, *each.shape), each.dtype), spec
    )
