"""How far pixels, and an embedding of them, are from open_clip's evaluation transform.

    python benchmarks/pixel_parity.py
    python benchmarks/pixel_parity.py --data "shards/test-*.tar"

Images without EXIF tag or transparency, which the two treat differently on purpose.
The embedding is that of open_clip's ViT-B/32 with random weights from a seed.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import io
import pathlib

import keras
import numpy as np
import open_clip
import torch
from made_shards import write_shards
from PIL import Image
from reporting import parser, publish

import keras_cluster_mask as kcm
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import Fault, PairReader

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--data", help="shards of your own, instead of photographs of scikit-image")
    add("--image-size", type=int, default=224)
    add("--most", type=int, default=1000, help="images that are compared at most")
    add("--results", default="results", help="folder for the JSON file")
    add("--shards", default="results/pixel_parity", help="folder for the shards")
    options = parsed.parse_args()
    options.data = options.data or write_shards(options.shards, 200, 640, 100)

    reference = open_clip.image_transform(options.image_size, is_train=False)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", force_image_size=options.image_size)
    model.eval()

    def embedding(pixels):
        with torch.no_grad():
            return model.encode_image(pixels[None], normalize=True)[0].numpy()

    batches = kcm.data.image_text_dataset(
        options.data,
        lambda captions: [[0]] * len(captions),
        options.image_size,
        1,
        training=False,
        include_keys=True,
        image_keys=IMAGE_KEYS,
        format="grain",
    )
    contents = plain_images(options.data)
    largest, means, levels, cosines = 0, [], [], []
    progress = keras.utils.Progbar(options.most, unit_name="image")
    for batch in batches:
        content = contents.get(batch["keys"][0].decode())
        if content is None:
            continue
        theirs = reference(Image.open(io.BytesIO(content)))
        mean, spread = (
            torch.tensor(numbers)[:, None, None]
            for numbers in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        ours = torch.from_numpy(batch["images"][0].transpose(2, 0, 1)) / 255.0
        difference = 255.0 * (ours - (theirs * spread + mean)).abs().numpy()
        largest = max(largest, difference.max())
        means.append(difference.mean())
        levels.append(np.mean(difference > 0.5))
        cosines.append(embedding((ours - mean) / spread) @ embedding(theirs))
        progress.add(1)
        if len(means) == options.most:
            break
    print()
    publish(
        f"{options.results}/pixel_parity.json",
        f"{pathlib.Path(options.data).name}, {options.image_size} px, against "
        "open_clip's transform",
        [
            {
                "images": len(means),
                "largest difference (of 255)": round(float(largest), 2),
                "mean difference": f"{np.mean(means):.4f}",
                "pixels that differ": f"{np.mean(levels):.2%}",
                "smallest cosine of embeddings": f"{min(cosines):.7f}",
            }
        ],
    )


def plain_images(data):
    """The bytes of images that both treat alike, by key."""
    index = open_index(data, PairReader(IMAGE_KEYS))
    found = {}
    for number in range(len(index)):
        (pair,) = index.read([number])
        if isinstance(pair, Fault):
            continue
        image = Image.open(io.BytesIO(pair.image))
        differs = {"exif", "transparency"} & image.info.keys()
        if image.mode in ("RGB", "L") and not differs:
            found[pair.key] = pair.image
    return found


if __name__ == "__main__":
    main()
