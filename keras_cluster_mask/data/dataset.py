"""Image-text pairs as a `tf.data.Dataset`."""

from keras_cluster_mask.data.batches import ImageTextBatches
from keras_cluster_mask.data.decoding import num_processors
from keras_cluster_mask.data.tokenizing import apply_layer, check_tokenizer, is_layer

try:
    import tensorflow as tf
except ImportError:
    tf = None


def image_text_dataset(
    source,
    tokenizer,
    image_size,
    batch_size,
    training,
    *,
    include_captions=False,
    **options,
):
    """Batches of images and token ids from shards, for `fit` and evaluation.

    Shards are WebDataset tar files, as img2dataset writes them (`KEY.jpg` is followed
    by `KEY.txt`), TFRecord files, or tables (CSV, TSV, JSON lines) that name image
    files. In training, the shards and the samples within a buffer are shuffled and each
    image is cropped at random. Otherwise each sample is read once, in the order of the
    files, with a center crop. Images are decoded in parallel and stay uint8: models
    scale them on the device. Their EXIF orientation is applied, and transparent parts
    are white.

    Broken samples (a missing image, a missing or empty caption, bytes that do not
    decode or are too large, a duplicate key) and the rest of damaged shards are
    skipped. The attribute `dataset.skipped` of the returned dataset, a
    `SkippedSamples`, counts them for the current or last pass, and a warning summarizes
    each pass. Methods such as `dataset.take` return datasets without this attribute.

    In training, each epoch has its own order, and its last partial batch is carried
    over to the next epoch. Two datasets with the same seed give the same batches in
    every epoch. The attribute `dataset.position`, a `Position`, is the next epoch and
    step; `kcm.callbacks.Checkpoint` saves and restores it. An image that does not
    decode is replaced by its neighbour in the batch, so that the number of steps does
    not depend on broken images.

    `ImageTextBatches` gives the same batches without TensorFlow.

    Example:

    ```python
    import io, tarfile
    import numpy as np
    from PIL import Image

    captions = ["a red square", "a blue square"]
    with tarfile.open("squares.tar", "w") as tar:
        for index, color in enumerate([(255, 0, 0), (0, 0, 255)]):
            image = io.BytesIO()
            Image.new("RGB", (64, 48), color).save(image, "PNG")
            caption = captions[index].encode()
            for name, content in (("png", image.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{index:04}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=600)
    dataset = kcm.data.image_text_dataset(
        "squares.tar", tokenizer, image_size=32, batch_size=2, training=True, seed=1
    )
    for batch in dataset:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    print(dataset.skipped)  # <SkippedSamples count=0>
    ```

    Args:
        source: str or path, or a list of them. Files or patterns of them, such as
            `"data/train-{00000..00127}.tar"` or `"gs://bucket/*.tar"`, or a folder with
            a table; see `list_shards`.
        tokenizer: A `CLIPTokenizer`; or any callable from a list of bytes to ints
            `(batch, length)`; or a Keras layer, such as a KerasHub `CLIPPreprocessor`,
            which runs inside the graph, does not clean captions, and may split numbers
            differently from CLIP.
        image_size: int or `(height, width)`.
        batch_size: int. The global batch size, over all devices.
        training: bool. Whether to shuffle and to take random crops.
        include_captions: bool. Whether batches hold the `"captions"`, strings.
        **options: The other arguments of `ImageTextBatches`: `seed`, `shuffle_buffer`,
            `crop_scale`, `horizontal_flip`, `background`, `image_keys`, `caption_key`,
            `caption_template`, `on_error`, `max_skipped`, `max_image_pixels`,
            `drop_remainder`, `data_format`, `include_keys`, `include_paths`, `process`,
            `num_threads`.

    Returns:
        A `tf.data.Dataset` of dicts: `"images"`, uint8 `(batch, height, width, 3)` or
        channels first, and `"token_ids"`, int32 `(batch, length)`.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If an argument is invalid, if the shards hold no sample with an
            image and a caption, or if they hold less than one batch and partial batches
            are dropped.
        ImportError: If TensorFlow is not installed.
    """
    if tf is None:
        raise ImportError(
            "`image_text_dataset` needs TensorFlow on every backend: `pip install "
            "tensorflow-cpu`, or use `ImageTextBatches`."
        )
    check_tokenizer(tokenizer)
    in_graph = is_layer(tokenizer)
    batches = ImageTextBatches(
        source,
        _no_tokens if in_graph else tokenizer,
        image_size,
        batch_size,
        training,
        include_captions=include_captions or in_graph,
        **options,
    )
    dataset = batches.as_dataset()
    if in_graph:

        def tokenized(batch):
            batch["token_ids"] = apply_layer(tokenizer, batch["captions"])
            if not include_captions:
                del batch["captions"]
            return batch

        dataset = dataset.map(tokenized, num_parallel_calls=num_processors())
        dataset = dataset.prefetch(2)
    dataset.skipped = batches.skipped
    if training:
        dataset.position = batches.position
    return dataset


def _no_tokens(captions):
    return [[]] * len(captions)
