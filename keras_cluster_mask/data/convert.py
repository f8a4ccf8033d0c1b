"""`convert`: writes any readable source as tar shards."""

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from typing import Any

from PIL import Image

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.data import files
from keras_cluster_mask.data.check import (
    broken_samples,
    decode_all,
    intact_samples,
    summary,
)
from keras_cluster_mask.data.images import EncodedImage
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import IMAGE_KEYS, PairReader

JPEG_QUALITY = 95
# File names have at most 255 bytes; a number and an extension are appended.
MAX_NAME = 200


def convert(
    source: Any,
    to: str | os.PathLike,
    *,
    samples_per_shard: int = 10_000,
    image_size: int | None = None,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
) -> dict:
    """Writes samples as tar shards in the layout of WebDataset and img2dataset.

    Samples keep their order and all their captions. `KEY.txt` holds the first caption,
    and where there are several, `KEY.json` holds all of them under `captions`. Keys
    stay as they are where a tar can hold them, and duplicates get a number. Images get
    the extension of their actual format. Consecutive rows of a table that name the same
    image become one sample. Broken samples are left out and counted; see `check`.

    Each shard is written under a temporary name and renamed when complete. No file is
    replaced: to repeat an interrupted conversion, remove its shards.

    Example:

    ```python
    kcm.data.convert("photos/metadata.csv", "shards/train-{00000}.tar")
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`. Or an object; see
            `image_text_dataset`.
        to: str or path. `"shards/train-{00000}.tar"` writes shards with numbers of five
            digits; a name without braces, such as `"train.tar"`, is a single shard. May
            be a URL such as `"s3://bucket/train-{00000}.tar"`.
        samples_per_shard: int. Defaults to `10000`.
        image_size: int. Images whose shorter side is longer are resized to this shorter
            side, with their EXIF orientation applied, and written as JPEG of quality
            95, or as PNG if they are transparent. Defaults to `None`: the bytes of all
            images are copied.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.

    Returns:
        dict: `"samples"`, the number of samples written; `"shards"`, the files;
        `"broken"`, `"by_reason"` and `"first_broken"`, as `check` returns them.

    Raises:
        FileNotFoundError: If a shard of `source` is missing.
        ValueError: If an argument is invalid, or if a shard of `to` exists already.
    """
    check_integer("samples_per_shard", samples_per_shard, 1)
    if image_size is not None:
        check_integer("image_size", image_size, 1)
    to = os.path.expanduser(os.fspath(to))
    match = re.fullmatch(r"([^{]*)(?:\{(0+)\}([^{]*))?", to)
    if not match or not to.endswith(".tar"):
        raise ValueError(
            "`to` must be the name of a tar file, with zeros in braces where the "
            "number of a shard goes, such as 'shards/train-{00000}.tar'. "
            f"Received: to={to!r}"
        )
    before, zeros, after = match.groups(default="")

    def free(number):
        """The name of a shard, if there is no such file."""
        number = f"{number:0{len(zeros)}}" if zeros else ""
        path = f"{before}{number}{after}"
        if files.exists(path):
            raise ValueError(
                f"`to` must not exist yet: choose another name. Received: to={path!r}"
            )
        return path

    free(0)
    index = open_index(source, PairReader(image_keys, caption_key))
    broken = broken_samples(index)
    samples = _merged(
        intact_samples(
            index, lambda pair: _encoded(pair, image_size), broken, "convert"
        )
    )
    shards, written, used_keys = [], 0, {}
    limit = samples_per_shard if zeros else None
    while (first := next(samples, None)) is not None:
        shards.append(free(len(shards)))
        rest = itertools.islice(samples, limit and limit - 1)
        with (
            files.replacing(shards[-1]) as file,
            tarfile.TarFile(
                fileobj=file, mode="w", format=tarfile.PAX_FORMAT
            ) as archive,
        ):
            for pair, (extension, content) in itertools.chain([first], rest):
                fields = {extension: content, **_caption_fields(pair.captions)}
                _write(archive, _unique_key(pair.key, used_keys), fields)
                written += 1
    return {"samples": written, "shards": shards, **summary(broken)}


def _merged(samples):
    """Samples, of which those in sequence with the same image file are one."""

    def image(sample):
        return sample[0].path or object()

    for _, group in itertools.groupby(samples, image):
        (pair, encoded), *others = group
        captions = sum((other.captions for other, _ in others), pair.captions)
        yield pair._replace(captions=captions), encoded


def _encoded(pair, image_size):
    """The extension and the bytes of an image as they are written."""
    content = pair.image
    image = EncodedImage(content)
    format = image.format
    if image_size and min(image.size) > image_size:
        content, format = _resized(image, image_size)
    else:
        decode_all(image)
    extension = "jpg" if format == "JPEG" else format.lower()
    # Readers find images of unusual formats under `image`.
    return extension if extension in IMAGE_KEYS else "image", content


def _resized(image, image_size):
    scale = image_size / min(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    array = image.whole(size)
    # JPEG has no transparency.
    format = "JPEG" if array.shape[2] == 3 else "PNG"
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, quality=JPEG_QUALITY)
    return file.getvalue(), format


def _caption_fields(captions):
    fields = {"txt": captions[0].encode("utf-8", "replace")}
    if len(captions) > 1:
        several = json.dumps({"captions": captions}, ensure_ascii=False)
        fields["json"] = several.encode("utf-8", "replace")
    return fields


def _write(archive, key, fields):
    for extension, content in fields.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    # The archive would keep every member in memory.
    archive.members.clear()


def _unique_key(key, used):
    """A key that a tar can hold, and that was not used before.

    Args:
        key: str.
        used: dict from each key that was used to the number of its next duplicate.
    """
    key = found = safe_key(key)
    # Numbers only increase, so that a frequent key needs no long search.
    while found in used:
        found = f"{key}-{used[key]}"
        used[key] += 1
    used[found] = 2
    return found


def safe_key(key):
    """A key as the name of files in a tar, and as a path below a folder on any system.

    Args:
        key: str.

    Returns:
        str: Without an image's extension, without parts that lead to other folders or
        that hide files, without a dot in its last part, which would end the key, and
        without characters that some systems do not allow in names.
    """
    key = re.sub(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", "", key, flags=re.IGNORECASE)
    key = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]', "_", key)
    # A key that is cut and equals another gets a number.
    names = (
        name.strip(". ").encode()[:MAX_NAME].decode("utf-8", "ignore").rstrip(". ")
        for name in key.split("/")
    )
    *folders, name = [name for name in names if name] or ["sample"]
    return "/".join([*folders, name.replace(".", "_")])
