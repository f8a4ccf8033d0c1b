"""Creates datasets of batches from shards, for `fit` and evaluation."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.data import files
from keras_cluster_mask.data.arguments import (
    check_crop_scale,
    check_process,
    check_samples,
    check_weights,
    choose_block_size,
    name_of,
)
from keras_cluster_mask.data.backgrounds import check_background
from keras_cluster_mask.data.captions import CaptionChoice
from keras_cluster_mask.data.images import MAX_PIXELS, Cutter, height_and_width
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.order import Mix, Order
from keras_cluster_mask.data.pairs import Labels, PairReader
from keras_cluster_mask.data.samples import Indexes, Samples
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.stream import ImageTextDataset, Spec
from keras_cluster_mask.data.text_masking import TextMasking, check_text_masking
from keras_cluster_mask.data.tokenizing import check_tokenizer, is_layer, length_of


def image_text_dataset(
    source: Any,
    tokenizer: Any,
    image_size: int | tuple[int, int],
    batch_size: int,
    training: bool,
    *,
    format: str | None = None,
    seed: int = 0,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    caption_template: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    resize: str = "crop",
    crop_scale: tuple[float, float] | None = None,
    horizontal_flip: bool = False,
    background: str | Sequence[str] = "white",
    image_transform: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    | None = None,
    include_captions: bool | str = False,
    include_keys: bool = False,
    include_paths: bool = False,
    data_format: str | None = None,
    max_image_pixels: int = MAX_PIXELS,
    max_skipped: float = 0.5,
    text_masking: TextMasking | None = None,
    sampling: Sampling | Callable[[int, int], np.ndarray] | None = None,
    block_size: int | None = None,
    process: tuple[int, int] | None = None,
    num_workers: int = 0,
    index_dir: str | os.PathLike | None = None,
) -> Any:
    """Creates a dataset of batches of images and token ids from shards.

    Shards are WebDataset tar files, as img2dataset writes them (`KEY.jpg` is followed
    by `KEY.txt`), TFRecord files, Parquet files, tables (CSV, TSV, JSON lines) that
    name image files, or folders of images. They are indexed on first use: a small
    hidden file next to each shard stores the position of each sample.
    `python -m keras_cluster_mask.data check SOURCE --workers N` indexes them in N
    processes.

    In training, the dataset is an endless stream. Each epoch is a new permutation of
    all samples. The last partial batch of an epoch is carried over to the next epoch.
    Each image is cropped at random. `len(dataset)` is the number of full batches in an
    epoch. The same seed gives the same batches with any number of processes and
    workers. `ContrastiveModel.fit` needs no `steps_per_epoch`; for other models, pass
    `steps_per_epoch=len(dataset)`.

    With `training=False`, each sample is read once, in the order of the shards, with a
    center crop.

    The index leaves out samples without an image or a caption, samples with a duplicate
    key, and samples after the damage in a damaged shard. An image that cannot be
    decoded, or cannot be read after several attempts, is replaced in training by
    another image of the same batch, so the number of steps never depends on broken
    samples. In evaluation it is skipped. `dataset.skipped`, a `SkippedSamples`, counts
    both.

    Images stay uint8, and models scale them on the device. The EXIF orientation is
    applied.

    Training shuffles samples of local files one by one. Files at URLs are read in
    blocks of up to 64 consecutive samples, which stay in one batch; see `block_size`.

    Example:

    ```python
    import pathlib
    from PIL import Image

    folder = pathlib.Path("squares")
    folder.mkdir(exist_ok=True)
    lines = ["file_name,caption"]
    for color in ("red", "blue"):
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
        lines.append(f"{color}.png,a {color} square")
    (folder / "metadata.csv").write_text("\\n".join(lines))

    tokenizer = kcm.data.CLIPTokenizer.train(["a red square", "a blue square"], 600)
    dataset = kcm.data.image_text_dataset(
        folder, tokenizer, image_size=32, batch_size=2, training=False
    )
    for batch in dataset:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    print(len(dataset), dataset.skipped)  # 1 <SkippedSamples count=0>
    ```

    Args:
        source: str or path, or a list of them: shards, folders, or patterns such as
            `"data/train-{00000..00127}.tar"` or `"gs://bucket/*.tar"`; see
            `list_shards`. Or an object with `__len__` and `__getitem__` whose items are
            dicts, such as a `Dataset` of the package `datasets`. Or a dict from several
            of these to weights, which mixes them in these proportions.
        tokenizer: A `CLIPTokenizer`; any callable from a list of bytes to ints
            `(batch, length)`; a tokenizer of open_clip; a tokenizer of Hugging Face,
            whose rows are padded and truncated to its `model_max_length`; or a Keras
            layer, such as a KerasHub `CLIPPreprocessor`, which does not clean captions,
            may split numbers differently from CLIP, and needs TensorFlow. With `None`,
            batches have no `"token_ids"`, and samples need no caption.
        image_size: int or `(height, width)`, in pixels.
        batch_size: int. The global batch size, over all processes and devices.
        training: bool. Whether to shuffle, to repeat, and to take random crops.
        format: `"grain"` for a `grain.IterDataset` of NumPy arrays, or `"tf"` for a
            `tf.data.Dataset`. Defaults to `None`: `"tf"` on the TensorFlow backend,
            unless `include_captions="all"`; else `"grain"`.
        seed: int. The random seed of the order, crops and captions. Defaults to `0`.
        image_keys: str or sequence of str. The field that holds the image: a file
            extension in a tar, a feature of a TFRecord, or a column of a table with
            file names. If several are given, the first that a sample has is used.
            Defaults to `None`: common names.
        caption_key: str or sequence of str. The field that holds the caption. If
            several are given, the first that is not empty is used. `"json.caption"` is
            the entry `caption` of the file `KEY.json`. If the field is a list of
            captions, one is drawn in each epoch; evaluation uses the first. Defaults to
            `None`: `"txt"` and other common names.
        caption_template: str or sequence of str that contain `{}` for the caption, such
            as `"a photo of a {}."`. If several are given, one is drawn for each sample
            and epoch; evaluation uses the first.
        label_key: str or sequence of str. The field that holds the class, such as
            `"cls"`, `"json.label"` or, for images in a folder, `"folder"`, the name of
            the folder. Batches then hold `"labels"`, int32. Defaults to `None`: no
            labels.
        class_names: sequence of str, for labels that are names: a label is the index of
            its name. Defaults to `None`: labels are numbers.
        resize: `"crop"`, random crops in training and CLIP's center crop in evaluation;
            or `"squash"`, the whole image with a changed aspect ratio, as for SigLIP.
        crop_scale: pair of floats. The range of the area of random crops, as a fraction
            of the image's area. Must be `None` for `resize="squash"`. Defaults to
            `None`: `(0.4, 1.0)`.
        horizontal_flip: bool. Whether to flip half of the images in training. Not
            suitable for captions that say left or right. Defaults to `False`.
        background: The background of transparent images: `"white"`, `"random"` (plain
            colors, gradients and textures), or a list of these, from which one is drawn
            for each image.
        image_transform: Function of a cropped image, uint8 `(height, width, 3)`, and a
            `np.random.Generator`, that returns an image of the same shape and dtype.
        include_captions: bool. Whether batches contain `"captions"`, UTF-8 bytes. With
            `"all"`, they are tuples of all captions of each image.
        include_keys: bool. Whether batches contain the `"keys"` of samples, bytes.
        include_paths: bool. Whether batches contain the `"paths"` of the image files,
            bytes; empty for images inside shards.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `None`:
            `keras.config.image_data_format()`.
        max_image_pixels: int. Images with more pixels count as broken. Reduced decoding
            allows larger JPEGs in training, but each pixel of a progressive JPEG counts
            as four. Defaults to 50 million.
        max_skipped: float. The fraction of samples that may be broken, from 0 to 1, in
            the index and among the samples read. A larger fraction raises an error
            after 1,000 samples; 0 raises it at the first. Defaults to `0.5`.
        text_masking: A `TextMasking` for training, such as `RandomTextMasking`,
            `BlockTextMasking` or `FrequencyTextMasking`. It shortens captions, template
            included, that have more tokens than the `context_length` of the
            `tokenizer`, which must be a `CLIPTokenizer`. It does not change
            `"captions"`, and evaluation is never masked. Defaults to `None`: captions
            that are too long are truncated.
        sampling: The samples of each epoch: a `Sampling`, or a function of the number
            of samples and the epoch (from 0) that returns an int array of sample
            indices, the same in each process. Only these samples are read, in shuffled
            order. `len(dataset)` is the number of full batches in the epoch that the
            dataset starts in. `steps_per_epoch` is that number for an epoch of mean
            length. Defaults to `None`: each sample once.
        block_size: int. In training, blocks of this many consecutive samples are read
            together and stay in one batch, which is faster on object stores and hard
            disks. The number of processes must divide `batch_size // block_size`.
            Defaults to `None`: 1 for local files; for URLs the largest power of two up
            to 64 that leaves 16 blocks in a batch.
        process: pair of ints. The index of this process and the number of processes.
            Each process reads only its rows of every batch. In evaluation, some
            processes may get one batch more than others. Defaults to the values of JAX
            or `torch.distributed`; for evaluation on torch to `(0, 1)`, all samples in
            every process.
        num_workers: int. The number of worker processes. They are spawned, so a program
            needs `if __name__ == "__main__":`. Defaults to `0`: threads of this
            process, which share the GIL and decode at most about 3,000 images per
            second on any number of cores.
        index_dir: str or path. The folder of the index. Defaults to `None`: next to the
            shards, or `~/.cache/keras_cluster_mask` for shards at URLs and in
            folders that cannot be written to.

    Returns:
        An `ImageTextDataset`, which is a `grain.IterDataset`, or a `tf.data.Dataset`,
        of dicts: `"images"`, uint8 `(batch, height, width, 3)` or channels first, and
        `"token_ids"`, int32 `(batch, length)`. Both have `len` and the attribute
        `skipped`; datasets that their methods return do not.

    Raises:
        FileNotFoundError: If a shard is missing.
        OSError: If a shard cannot be read.
        ValueError: If an argument is invalid, if a shard does not support random
            access, if there is no intact sample, or if an epoch of training has fewer
            samples than a batch.
        ImportError: If a package that reads the shards is not installed.
    """
    import keras

    if format is None:
        # A `tf.data.Dataset` cannot hold tuples of captions.
        has_tuples = include_captions == "all"
        on_tensorflow = keras.backend.backend() == "tensorflow"
        format = "tf" if on_tensorflow and not has_tuples else "grain"
    check_choice("format", format, ("grain", "tf"))
    image_size = height_and_width(image_size)
    batch_size = check_integer("batch_size", batch_size, 1)
    seed = check_integer("seed", seed, 0)
    num_workers = check_integer("num_workers", num_workers, 0)
    max_image_pixels = check_integer("max_image_pixels", max_image_pixels, 1)
    check_background(background)
    data_format = data_format or keras.config.image_data_format()
    check_choice("data_format", data_format, ("channels_last", "channels_first"))
    check_choice("resize", resize, ("crop", "squash"))
    check_choice("include_captions", include_captions, (False, True, "all"))
    crop_scale = check_crop_scale(crop_scale, resize)
    check_range("max_skipped", max_skipped, 0, 1)
    if class_names is not None and label_key is None:
        raise ValueError(
            "`class_names` need labels: pass the `label_key` of the field that holds "
            f"them. Received: class_names={class_names}, label_key=None"
        )
    for name, value in (("sampling", sampling), ("block_size", block_size)):
        if value is not None and not training:
            raise ValueError(
                f"`{name}` is for training: evaluation reads each sample once, in "
                f"order. Received: {name}={value!r}, training=False"
            )
    if not (sampling is None or callable(sampling) or isinstance(sampling, Sampling)):
        raise ValueError(
            "`sampling` must be a `kcm.data.Sampling`, which takes a dict or keys, or "
            "a function of the number of samples and the epoch. "
            f"Received: sampling={sampling!r}"
        )
    check_tokenizer(tokenizer)
    if text_masking is not None:
        check_text_masking(text_masking, tokenizer)
        text_masking = text_masking if training else None
    process = check_process(process, batch_size, training)
    reader = PairReader(
        image_keys,
        caption_key,
        wants_caption=bool(tokenizer is not None or include_captions),
        labels=None if label_key is None else Labels(label_key, class_names),
    )
    sources, weights = [source], None
    if isinstance(source, Mapping):
        sources, weights = list(source), list(source.values())
        check_weights(source, training, sampling)
    indexes = [open_index(each, reader, index_dir, process=process) for each in sources]
    skipped = SkippedSamples(indexes, max_skipped)
    check_samples(indexes, skipped, reader)
    index = indexes[0] if len(indexes) == 1 else Indexes(indexes)
    skipped.report_index(len(index))
    order = range(len(index))
    if training:
        remote = any(files.is_address(path) for each in indexes for path in each.paths)
        block_size = choose_block_size(block_size, batch_size, process[1], remote)
        if isinstance(sampling, Sampling):
            sampling = sampling.of_index(index)
        orders = [
            Order(len(each), seed, block_size, sampling, source)
            for source, each in enumerate(indexes)
        ]
        order = orders[0] if weights is None else Mix(orders, weights)
        if order.length(0) < batch_size:
            raise ValueError(
                "`batch_size` must not exceed the number of samples in an epoch, all "
                "of `source` or those that `sampling` chooses, because training uses "
                f"full batches only. Received: batch_size={batch_size}, "
                f"{order.length(0)} samples"
            )

    rows = batch_size // process[1] if training else None
    channels_first = data_format == "channels_first"
    shape = (3, *image_size) if channels_first else (*image_size, 3)
    all_captions = include_captions == "all"
    text = Spec((rows,), "string")
    captions = Spec((rows,), "object") if all_captions else text
    token_ids = Spec((rows, length_of(tokenizer)), "int32")
    specs = {
        "images": Spec((rows, *shape), "uint8"),
        "token_ids": tokenizer is not None and token_ids,
        "captions": include_captions and captions,
        "keys": include_keys and text,
        "paths": include_paths and text,
        "labels": label_key is not None and Spec((rows,), "int32"),
    }
    element_spec = {name: spec for name, spec in specs.items() if spec}
    names = {*element_spec}
    # Layers cannot be sent to a worker process.
    has_layer = is_layer(tokenizer)
    if has_layer:
        names = names - {"token_ids"} | {"captions"}
    samples = Samples(
        index=index,
        order=order,
        seed=seed,
        batch_size=batch_size,
        process=process,
        training=training,
        cutter=Cutter(
            image_size,
            training,
            resize,
            crop_scale,
            horizontal_flip,
            background,
            image_transform,
            max_image_pixels,
        ),
        choose=CaptionChoice(caption_template, training),
        tokenizer=None if has_layer else tokenizer,
        names=names,
        all_captions=all_captions,
        channels_first=channels_first,
        text_masking=text_masking,
    )
    dataset = ImageTextDataset(
        samples,
        tokenizer,
        num_workers,
        skipped,
        element_spec,
        {
            "data.shards": sum(len(each.paths) for each in indexes),
            "data.samples": len(index),
            "data.index": [each.fingerprint for each in indexes],
            "data.weights": weights and [float(weight) for weight in weights],
            "data.batch_size": batch_size,
            "data.seed": seed,
            "data.block_size": block_size,
            "data.sampling": None if sampling is None else order.digest(),
            "data.image_size": list(image_size),
            "data.crop_scale": crop_scale and [float(bound) for bound in crop_scale],
            "data.horizontal_flip": bool(horizontal_flip),
            "data.caption_template": repr(caption_template),
            "data.background": repr(background),
            "data.max_image_pixels": max_image_pixels,
            "data.image_transform": name_of(image_transform),
            "data.tokenizer": name_of(tokenizer),
            "data.text_masking": text_masking and repr(text_masking),
        },
    )
    return dataset.as_dataset() if format == "tf" else dataset
