"""Runs the README and the quickstart, in a folder without a clone's files.

    python from_wheel.py

Encoders are read from the folder that KERAS_CLUSTER_MASK_ENCODERS names.
"""

import csv
import os
import pathlib
import re
import tarfile

import keras

import keras_cluster_mask as kcm

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENCODERS = os.environ["KERAS_CLUSTER_MASK_ENCODERS"]
# In place of downloads, and of minutes.
CHANGES = {
    '"dinov2_small"': repr(f"{ENCODERS}/dinov2_small"),
    '"all_minilm_l6_v2_en"': repr(f"{ENCODERS}/all_minilm_l6_v2"),
    # Without TensorFlow, SigLIP has no tokenizer.
    '"siglip2_base_patch32_256"': "'./clip'",
    "test=1000": "test=32",
    "holiday/*.jpg": "photos/*.webp",
    "fit(train, epochs=9": "fit(train, epochs=1, steps_per_epoch=5",
}


def write_photographs(folder, count=128):
    """Writes images and the table of their captions."""
    with tarfile.open(kcm.data.example_images() / "test-00000.tar") as archive:
        archive.extractall(folder, archive.getmembers()[: 2 * count], filter="data")
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for image in sorted(folder.glob("*.webp")):
            table.writerow([image.name, image.with_suffix(".txt").read_text()])


def write_clip(folder):
    """Writes a tiny CLIP as a preset."""
    tokenizer = kcm.data.CLIPTokenizer.train(["number"] * 9, 600, context_length=77)
    backbone = kcm.models.clip_backbone("tiny", 48, tokenizer.vocabulary_size, 77)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.save_to_preset(folder, tokenizer)


def run(page):
    """Runs the blocks of a page in one scope."""
    text = (ROOT / page).read_text(encoding="utf-8")
    scope = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for shown, used in CHANGES.items():
            code = code.replace(shown, used)
        exec(compile(code, page, "exec"), scope)
    keras.config.set_dtype_policy("float32")


if __name__ == "__main__":
    # Not the clone, which may hold the environment.
    assert ROOT / "keras_cluster_mask" not in pathlib.Path(kcm.__file__).parents
    write_photographs(pathlib.Path("photos"))
    write_clip("clip")
    run("README.md")
    run("docs/quickstart.md")
