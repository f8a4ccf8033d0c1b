"""Shards of photographs for the data benchmarks, made from those of scikit-image."""

import io
import pathlib
import tarfile

import numpy as np
import skimage.data
from PIL import Image
from tqdm import tqdm

# Photographs and scans that come with the package.
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina")
SHAPES = (4 / 3, 3 / 4, 3 / 2, 1)
TEXT = "a the photograph image of cat cup rocket stars woman eye red dark on in"
WORDS = TEXT.split()


def photographs(count, short_side, seed=0):
    """JPEG files of parts of photographs, as img2dataset stores them: quality 95.

    Args:
        count: int.
        short_side: int. Pixels of the shorter side.
        seed: int.

    Yields:
        bytes.
    """
    sources = [Image.fromarray(getattr(skimage.data, name)()) for name in NAMES]
    generator = np.random.default_rng(seed)
    for index in range(count):
        source = sources[index % len(sources)].convert("RGB")
        shape = SHAPES[generator.integers(len(SHAPES))]
        size = short_side * max(shape, 1), short_side * max(1 / shape, 1)
        # As large a part of this shape as there is, a little smaller, somewhere.
        fit = min(s / t for s, t in zip(source.size, size)) * generator.uniform(0.7, 1)
        part = [fit * side for side in size]
        place = [generator.uniform(0, s - p) for s, p in zip(source.size, part)]
        box = (*place, *(start + side for start, side in zip(place, part)))
        image = source.resize([*map(round, size)], Image.Resampling.BICUBIC, box)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        yield file.getvalue()


def write_shards(folder, samples, short_side, per_shard, different=200):
    """Writes shards of `KEY.jpg`, `KEY.txt` and `KEY.json`, unless they are there.

    Args:
        folder: path.
        samples: int. How many in all.
        short_side: int. Pixels.
        per_shard: int.
        different: int. How many different images there are.

    Returns:
        str, a pattern of the shards.
    """
    folder = pathlib.Path(folder) / f"{samples}x{short_side}px"
    pattern = f"{folder}/{{00000..{samples // per_shard - 1:05}}}.tar"
    if (folder / "complete").exists():
        return pattern
    folder.mkdir(parents=True, exist_ok=True)
    images = list(photographs(min(different, samples), short_side))
    generator = np.random.default_rng(1)
    for shard in tqdm(range(samples // per_shard), "write", unit=" shards"):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for index in range(shard * per_shard, (shard + 1) * per_shard):
                caption = " ".join(generator.choice(WORDS, generator.integers(5, 20)))
                for ending, content in (
                    ("jpg", images[index % len(images)]),
                    ("txt", caption.encode()),
                    ("json", b'{"url": "http://example.org/%09d.jpg"}' % index),
                ):
                    member = tarfile.TarInfo(f"{index:09}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (folder / "complete").touch()
    return pattern
