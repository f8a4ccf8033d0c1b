"""SugarCrepe: whether a model tells a caption from one that is wrong in one thing."""

import json
import os

import numpy as np

from keras_cluster_mask.data import ImageTextBatches, files
from keras_cluster_mask.evaluation.checks import check_embeddings
from keras_cluster_mask.evaluation.embedding import (
    BATCH_SIZE,
    Embedder,
    Progress,
    embed_texts,
)
from keras_cluster_mask.evaluation.ranks import TIE
from keras_cluster_mask.models.loading import image_size_of

KINDS = {
    "add": ("add_att", "add_obj"),
    "replace": ("replace_att", "replace_obj", "replace_rel"),
    "swap": ("swap_att", "swap_obj"),
}
SPLITS = tuple(split for splits in KINDS.values() for split in splits)
# The fields of an entry.
PICTURE = "filename"
TEXTS = "caption", "negative_caption"


def caption_selection_accuracy(
    image_embeddings, caption_embeddings, negative_embeddings
):
    """How often an image is more similar to its caption than to a wrong one.

    Captions that are as similar as each other, to the rounding of 32 bits, count as a
    failure, so a model that embeds all texts, or those of the same words, alike gets
    nothing for them.

    Example:

    ```python
    images = np.eye(4, 16)
    negatives = np.roll(images, 1, axis=0)
    kcm.evaluation.caption_selection_accuracy(images, images, negatives)  # 1.0
    ```

    Args:
        image_embeddings: `(items, d)` array, L2-normalised.
        caption_embeddings: `(items, d)` array, L2-normalised. Row i is of the caption
            of the image of row i.
        negative_embeddings: `(items, d)` array, L2-normalised. Row i is of its wrong
            caption.

    Returns:
        A float in `[0, 1]`. Chance is 0.5.

    Raises:
        ValueError: For embeddings of different shapes, and for NaN embeddings.
    """
    images = check_embeddings("image_embeddings", image_embeddings)
    captions = check_embeddings("caption_embeddings", caption_embeddings)
    negatives = check_embeddings("negative_embeddings", negative_embeddings)
    if not images.shape == captions.shape == negatives.shape:
        raise ValueError(
            "The embeddings must be of one shape. Received: "
            f"image_embeddings.shape={images.shape}, "
            f"caption_embeddings.shape={captions.shape}, "
            f"negative_embeddings.shape={negatives.shape}"
        )
    margins = np.einsum("id,id->i", images, captions - negatives, dtype="float64")
    return float(np.mean(margins > TIE))


def evaluate_sugarcrepe(
    model,
    annotations,
    pictures,
    tokenizer,
    image_size=None,
    splits=SPLITS,
    batch_size=BATCH_SIZE,
    verbose="auto",
):
    """How often a model prefers right captions to SugarCrepe's wrong ones.

    SugarCrepe holds 7,511 captions of photographs, and beside each a fluent one in
    which an object, an attribute or a relation was added or replaced, or two were
    swapped. A caption wins if its similarity to the picture is strictly higher, as the
    authors count; see `caption_selection_accuracy`.

    Each picture and each text is embedded once, in however many splits it occurs.

    Example:

    ```python
    import json
    import pathlib
    from PIL import Image

    Image.new("RGB", (48, 32), "red").save("1.jpg")
    entry = {"filename": "1.jpg", "caption": "red", "negative_caption": "blue"}
    pathlib.Path("replace_att.json").write_text(json.dumps({"0": entry}))
    tokenizer = kcm.data.CLIPTokenizer.train(["red", "blue"], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    kcm.evaluation.evaluate_sugarcrepe(
        backbone, ".", ".", tokenizer, splits=["replace_att"]
    )
    # {"accuracy": {"replace_att": 1.0}, "count": {"replace_att": 1}, "chance": 0.5}
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone` or `SigLIPBackbone`, or
            the path of one that was saved.
        annotations: str or path. The folder `data` of the authors' repository, with
            `add_att.json` and so on.
        pictures: str or path. The folder with the pictures, those of COCO val2017.
        tokenizer: See `embed`.
        image_size: Integer or `(height, width)`. By default what the model takes.
        splits: Names of the files to evaluate on, without `.json`.
        batch_size: Integer. How many pictures are decoded together.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary: `"accuracy"`, a dictionary of floats in `[0, 1]`; `"count"`, a
        dictionary of how many pairs of captions each split has; and `"chance"`, 0.5.
        The accuracies are those of the splits; of `"add"`, `"replace"` and `"swap"`,
        the means of their splits; and of `"mean"`, that of all seven. In a mean each
        split counts the same, whatever its size; it is left out if one of them is. The
        authors' program reports the splits alone.

    Raises:
        FileNotFoundError: For a split or pictures that are missing.
        ValueError: For unknown splits, for an entry without a picture or captions, and
            for a picture that does not decode.

    Reference:
        - [SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality](
          https://arxiv.org/abs/2306.14610)
    """
    embedder = Embedder.of(model)
    if image_size is None:
        image_size = _image_size(embedder.model)
    annotations, pictures = (
        os.path.expanduser(os.fspath(folder)) for folder in (annotations, pictures)
    )
    entries = _read(annotations, splits)
    paths = _find(
        pictures, {name for each in entries.values() for name in each[PICTURE]}
    )
    images = _embed_pictures(
        embedder, [*paths.values()], image_size, batch_size, verbose
    )
    image_of = {name: row for row, name in enumerate(paths)}
    texts = {text for each in entries.values() for name in TEXTS for text in each[name]}
    text_of = {text: row for row, text in enumerate(sorted(texts))}
    texts = embed_texts(embedder, [*text_of], tokenizer, verbose)
    accuracy = {
        split: caption_selection_accuracy(
            images[[image_of[name] for name in each[PICTURE]]],
            *(texts[[text_of[text] for text in each[name]]] for name in TEXTS),
        )
        for split, each in entries.items()
    }
    for name, members in {**KINDS, "mean": SPLITS}.items():
        if entries.keys() >= {*members}:
            accuracy[name] = float(np.mean([accuracy[split] for split in members]))
    return {
        "accuracy": accuracy,
        "count": {split: len(each[PICTURE]) for split, each in entries.items()},
        "chance": 0.5,
    }


def _image_size(model):
    """The height and width that a model takes."""
    size = image_size_of(model)
    if None in size:
        raise ValueError(
            "`image_size` must be given for a model that takes images of any size, or "
            f"does not say which. Received: image_size=None, model={model.name}"
        )
    return size


def _read(folder, splits):
    """For each split a dictionary of the fields, each a list with a str per entry."""
    splits = [splits] if isinstance(splits, str) else list(splits)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise ValueError(
            f"`splits` must be some of {', '.join(SPLITS)}. Received: splits={splits}"
        )
    paths = {split: _within(folder, f"{split}.json") for split in splits}
    missing = [path for path in paths.values() if not files.exists(path)]
    if missing:
        raise FileNotFoundError(
            "`annotations` must be a folder with a file for each split. Received a "
            f"folder without: {', '.join(missing)}"
        )
    return {split: _read_split(path) for split, path in paths.items()}


def _read_split(path):
    with files.open_file(path) as file:
        try:
            entries = json.load(file)
        except ValueError as error:
            raise ValueError(
                f"`annotations` must hold files of JSON. Received: {path}, {error}"
            ) from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            "`annotations` must hold files of a JSON object with an entry for each "
            f"caption. Received: {path} with {str(entries)[:60]}"
        )
    for index, entry in entries.items():
        given = entry if isinstance(entry, dict) else {}
        lacking = [
            field
            for field in (PICTURE, *TEXTS)
            if not isinstance(given.get(field), str) or not given[field].strip()
        ]
        if lacking:
            raise ValueError(
                "`annotations` must hold entries with a filename, a caption and a "
                f"negative_caption. Received: {path} with the entry {index!r} without "
                + ", ".join(lacking)
            )
    return {
        field: [entry[field] for entry in entries.values()]
        for field in (PICTURE, *TEXTS)
    }


def _find(folder, names):
    """The paths of the pictures by their names in the annotations, in order."""
    if not files.is_folder(folder):
        raise FileNotFoundError(
            "`pictures` must be the folder with the pictures. "
            f"Received: pictures={folder}"
        )
    paths = {name: _within(folder, name) for name in names}
    # The order in which they are read.
    paths = dict(sorted(paths.items(), key=lambda item: item[1]))
    missing = [name for name, path in paths.items() if not files.exists(path)]
    if missing:
        raise FileNotFoundError(
            f"`pictures` must hold all {len(names)} pictures of the annotations. "
            f"Received: {folder} without {len(missing)} of them, the first "
            f"{', '.join(missing[:5])}"
        )
    return paths


def _embed_pictures(embedder, paths, image_size, batch_size, verbose):
    """`(pictures, d)` embeddings of files whose names are sorted."""
    batches = ImageTextBatches(
        paths,
        None,
        image_size,
        batch_size,
        training=False,
        on_error="raise",
        # All of them in every process.
        process=(0, 1),
    )
    progress = Progress(verbose, len(paths), "image")
    found = []
    for batch in batches:
        found.append(embedder.images(batch["images"]))
        progress.add(len(found[-1]))
    return np.concatenate(found)


def _within(folder, name):
    return files.beside(folder.rstrip("/") + "/", name)
