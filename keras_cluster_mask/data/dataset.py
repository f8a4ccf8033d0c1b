"""Creates datasets of batches from shards, for `fit` and evaluation."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.data.batches import Batches, Captions
from keras_cluster_mask.data.images import Images
from keras_cluster_mask.data.samples import Fields
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.stream import ImageTextDataset
from keras_cluster_mask.data.text_masking import TextMasking


def image_text_dataset(
    source: Any,
    tokenizer: Any,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    training: bool = True,
    *,
    seed: int = 0,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    resize: str | None = None,
    crop_scale: tuple[float, float] | None = None,
    image_transform: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    | None = None,
    include_captions: bool | str = False,
    include_keys: bool = False,
    max_skipped: float = 0.01,
    text_masking: TextMasking | None = None,
    sampling: Sampling | None = None,
    block_size: int | None = None,
    process: tuple[int, int] | None = None,
    num_workers: int = 0,
    index_dir: str | os.PathLike | None = None,
) -> ImageTextDataset:
    """Reads images and captions, from shards, tables or folders, as batches.

    A source is WebDataset shards, tar files as img2dataset writes them (`KEY.jpg` is
    followed by `KEY.txt`), Parquet files, tables (CSV, TSV, JSON lines) that name image
    files, or folders of images, in which `KEY.txt` is the caption of `KEY.jpg`. Sources
    are indexed on first use: a small file for each file or folder, in a cache folder,
    stores the position of each sample. `check` reads all samples, and lists the broken
    ones.

    Rows of a table or Parquet file with the same image form one sample with several
    captions. They must be in one file and have the same label.

    In training, the dataset is an endless stream. Each epoch is a new permutation of
    all samples. The last partial batch of an epoch is carried over to the next epoch.
    Each image is cropped at random. `len(dataset)` is the number of full batches in an
    epoch. The same seed gives the same batches with any number of processes and
    workers. `ContrastiveModel.fit` needs no `steps_per_epoch`. Other Keras models take
    `fit(((batch,) for batch in dataset), steps_per_epoch=len(dataset))`, and TensorFlow
    takes `dataset.as_dataset()`.

    With `training=False`, each sample is read once, in the order of the files, with a
    center crop.

    The index leaves out samples without an image or a caption, samples with a duplicate
    key, samples after the damage in a damaged file, and table rows that name a missing
    local image file. An image that cannot be read or decoded is replaced in training by
    another image of its source, so the number of steps never depends on broken samples.
    In evaluation it is skipped. `dataset.skipped`, a `SkippedSamples`, counts both
    cases. A read is tried four times within 6 seconds. Storage at a URL that does not
    answer for 60 seconds counts as a failed read, so its last error comes after 4
    minutes.

    Images stay uint8, and models scale them on the device. The EXIF orientation is
    applied. Transparent pixels become white. The order of the axes is
    `keras.config.image_data_format()`.

    An image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels counts as broken. The
    limit is read when the dataset is created, also for worker processes, and must stay
    the same while the dataset is read; `None` means no limit. In training, a large JPEG
    is reduced while it is decoded, so its reduced size must be within the limit, and
    its full size within twice the limit. Each pixel of a progressive JPEG counts as
    four, because its coefficients are kept in full.

    Training shuffles samples of local files one by one. Files at URLs and Parquet files
    are read in blocks of up to 64 consecutive samples; see `block_size`.

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
        source: String or path, or a list of them: files, folders, or patterns such as
            `"data/train-{00000..00127}.tar"` or `"gs://bucket/*.tar"`; see
            `list_shards`. Or an object with `__len__` and `__getitem__` that holds
            dictionaries, such as a `Dataset` of the package `datasets`; an image is
            bytes, a file name, a `PIL.Image.Image`, or a uint8 array. Only one thread
            at a time reads items of objects and decodes their images, unless the object
            has the attribute `thread_safe = True`. Or a part that `split` returned. Or
            a dictionary from several such sources to weights, to mix the sources in
            these proportions.
        tokenizer: A `CLIPTokenizer`; any callable from a list of strings to integers
            `(batch, length)`; an open_clip tokenizer; a Hugging Face tokenizer, with
            rows padded and truncated to its `model_max_length`; or a Keras layer, such
            as a KerasHub `CLIPPreprocessor`, which does not clean captions, may split
            numbers differently from CLIP, and needs TensorFlow. With `None`, batches
            have no `"token_ids"`, and samples need no caption. Or a `ContrastiveModel`,
            to use its tokenizer, image size and `resize`; if `label_key` is given
            without `caption_key`, its tokenizer is not used.
        image_size: Integer or `(height, width)`, in pixels. Must be `None` for a model,
            unless its image encoder takes images of any size.
        batch_size: Integer. The global batch size, over all processes and devices.
            Defaults to `64`.
        training: Boolean. Whether to shuffle, to repeat, and to take random crops.
            Defaults to `True`.
        seed: Integer. The random seed of the order, crops and captions. Defaults to
            `0`.
        image_keys: String or sequence of strings. The field that holds the image: a
            file extension in a tar, or a column of a table with file names. If several
            are given, the first that a sample has is used. Defaults to `None`: common
            names.
        caption_key: String or sequence of strings. The field that holds the caption. If
            several are given, the first that is not empty is used. `"json.caption"` is
            the entry `caption` of the file `KEY.json`. If the field is a list of
            captions, one is drawn in each epoch; evaluation uses the first. Captions
            are UTF-8: invalid bytes become U+FFFD, and a sample in UTF-16 is broken.
            Defaults to `None`: `"txt"` and other common names. Each line of the field
            `txt` is then a caption, as in shards of CLIP_benchmark, unless `KEY.json`
            has the entry `caption`, as in shards of img2dataset. `"txt"` makes the
            whole field one caption.
        label_key: String or sequence of strings. The field that holds the class, such
            as `"cls"`, `"json.label"` or, for images in a folder, `"folder"`, the name
            of the folder. Batches then hold `"labels"`, int32. Defaults to `None`: no
            labels.
        class_names: Sequence of strings, for labels that are names: a label is the
            index of its name. Defaults to `None`: labels are numbers, or, if
            `label_key` is `"folder"` and not all folders have numbers, indices of the
            sorted names of the folders with images.
        resize: String. `"crop"`: random crops in training, and CLIP's center crop in
            evaluation. `"squash"`: the whole image with a changed aspect ratio, as for
            SigLIP. Defaults to `None`: the model's value, or `"crop"` without a model.
        crop_scale: Pair of floats. The range of the area of random crops, as a fraction
            of the image's area. Must be `None` for `resize="squash"` and in evaluation.
            Defaults to `None`: `(0.4, 1.0)`.
        image_transform: Function of a cropped training image, uint8
            `(height, width, 3)`, and a `np.random.Generator`, that returns an image of
            the same shape and dtype. It may change the image in place. Must be `None`
            in evaluation. Defaults to `None`.
        include_captions: Boolean, or `"all"`. Whether batches contain `"captions"`,
            UTF-8 bytes. With `"all"`, each is a tuple of all captions of an image.
            Defaults to `False`.
        include_keys: Boolean. Whether batches contain the `"keys"` of samples, str. The
            key of a table row is the value of its first column. Defaults to `False`.
        max_skipped: Float. The maximum fraction of samples that may be broken, from 0
            to 1, in each source of a dictionary. An error is raised if more samples are
            broken in the index, or among the samples that a process reads in one pass
            over the source. Samples that a damaged file has lost count as broken; see
            `check`. Defaults to `0.01`.
        text_masking: A `TextMasking` for training, such as `RandomTextMasking`,
            `BlockTextMasking` or `FrequencyTextMasking`. It shortens captions that have
            more tokens than the `context_length` of the `tokenizer`, which must pad the
            ends of rows. It does not change `"captions"`, and evaluation is never
            masked. Defaults to `None`: captions that are too long are truncated.
        sampling: A `Sampling`, which chooses the samples of each training epoch. Only
            these samples are read, in shuffled order. `len(dataset)` is the number of
            full batches in the epoch that the dataset starts in, and `steps_per_epoch`
            in an epoch of mean length. Defaults to `None`: each sample once.
        block_size: Integer. In training, blocks of this many consecutive samples are
            read together, which is faster on object stores and hard disks. A block may
            begin in one batch and end in the next. The number of processes must divide
            `batch_size // block_size`. Defaults to `None`: 1 for local files; for URLs
            and Parquet files the largest power of two up to 64 that leaves 16 blocks in
            a batch.
        process: Pair of integers. The index of this process and the number of
            processes. Each process reads only its rows of every batch. In evaluation,
            some processes may get one batch more than others. Defaults to the values of
            JAX or `torch.distributed`; for evaluation on torch to `(0, 1)`, all samples
            in every process.
        num_workers: Integer. The number of worker processes. They are spawned, so a
            program needs `if __name__ == "__main__":`. Defaults to `0`: threads of this
            process, which share the GIL and decode at most about 2,200 images per
            second on any number of cores.
        index_dir: String or path. The folder of the index. `"beside"` writes a hidden
            file next to each local file in a writable folder. Defaults to `None`:
            `~/.cache/keras_cluster_mask`, unless such a hidden file exists.

    Returns:
        An `ImageTextDataset`, an iterable of dictionaries of NumPy arrays: `"images"`,
        uint8 `(batch, height, width, 3)` or channels first, and `"token_ids"`, int32
        `(batch, length)`. It has a length, and `dataset[n]` is the batch `n`.

    Raises:
        FileNotFoundError: If a file is missing.
        OSError: If a file cannot be read.
        ValueError: If an argument is invalid, if a file does not support random
            access, if there is no intact sample, or if an epoch of training has fewer
            samples than a batch.
        ImportError: If a package that reads the files is not installed.
    """
    import keras

    # A model: `data` imports no models, and worker processes must not receive one.
    if (of_model := getattr(tokenizer, "preprocessing", None)) is not None:
        size, own = of_model["image_size"], of_model["resize"]
        for name, given, expected in (
            ("image_size", image_size, None if None in size else size),
            ("resize", resize, own),
        ):
            if given is not None and expected is not None:
                raise ValueError(
                    f"`{name}` must be None for a model, which defines it. "
                    f"Received: {name}={given!r}, a model with {name}={expected!r}"
                )
        tokenizer, image_size, resize = of_model["tokenizer"], image_size or size, own
        if label_key is not None and caption_key is None:
            tokenizer = None
        elif tokenizer is None:
            raise ValueError(
                "`tokenizer` must be a model with a tokenizer: set `model.tokenizer` "
                "to the one that the model was trained with. "
                "Received: a model with tokenizer=None"
            )
    images = Images(
        image_size=image_size,
        training=training,
        resize=resize or "crop",
        crop_scale=crop_scale,
        image_transform=image_transform,
        data_format=keras.config.image_data_format(),
    )
    captions = Captions(
        tokenizer=tokenizer,
        training=training,
        text_masking=text_masking,
        include_captions=include_captions,
    )
    fields = Fields(
        image_keys=image_keys,
        caption_key=caption_key,
        wants_caption=captions.are_read,
        label_key=label_key,
        class_names=class_names,
    )
    batches = Batches(
        source=source,
        images=images,
        captions=captions,
        fields=fields,
        batch_size=batch_size,
        training=training,
        seed=seed,
        sampling=sampling,
        block_size=block_size,
        process=process,
        num_workers=num_workers,
        index_dir=index_dir,
        max_skipped=max_skipped,
        include_keys=include_keys,
    )
    return ImageTextDataset(batches)
