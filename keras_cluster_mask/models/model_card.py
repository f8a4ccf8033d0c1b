"""Saves a model with a model card, as a folder to share."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from keras_cluster_mask.training.tokenizers import tokenizer_of

_CARD = """\
---
library_name: keras
license:  # fill in
tags: [clip, image-text]
---

# {name}

Embeds images of {size} and texts of {length} in one space, where an image
lies near the texts that describe it.

## Use

Needs the packages keras_cluster_mask and {backend}, and `KERAS_BACKEND={backend}`.

```python
import keras
import keras_cluster_mask  # The file has layers of it.

model = keras.saving.load_model("model.keras")
images = model.encode_image(["photo.jpg"])
texts = model.encode_text(["a dog in the snow", "a red boat"])
print(images @ texts.T)  # cosine similarities
```

## Data

{data}

## Training

- **Image encoder**: {image.name}, {image_weights:,} weights
- **Text encoder**: {text.name}, {text_weights:,} weights
- **Masking**: {masking}
- **Optimizer**: {optimizer}

## Recall

{recall}

## Versions

{versions}
"""

# Entries of a configuration that do not inform a reader.
_UNSAID = {"name", "dtype", "trainable", "data_format", "ema_momentum", "epsilon"}


def save_with_card(
    model: keras.Model,
    folder: str | os.PathLike,
    data: str = "",
    recall: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model with a model card, as a folder to share.

    The folder holds the card, `README.md`, and `model.keras`, with the tokenizer and
    without masking and optimizer. The card describes the use of the model, its
    encoders, masking and optimizer, its recall beside chance, and package versions.
    Fill in the license, which the card leaves empty. Hugging Face shows such a card as
    the page of a model.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog", "a boat"] * 9, 600, 8)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 8)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    kcm.models.save_with_card(model, "my_model", data="500 photographs of boats.")
    ```

    Args:
        model: A `ContrastiveModel` with a tokenizer.
        folder: Path of a folder, created if needed.
        data: A description of the training data, as Markdown.
        recall: Dictionary that `kcm.evaluation.evaluate_retrieval` returned.

    Raises:
        ValueError: If the model has no tokenizer, or a masking that `without_masking`
            cannot remove, or if the folder has a `README.md`.
    """
    folder = Path(folder)
    card = folder / "README.md"
    if card.exists():
        raise ValueError(
            "`folder` must have no README.md, which may have been edited: delete it, "
            f"or choose another folder. Received: {folder}"
        )
    tokenize = tokenizer_of(model)  # Raises an error if it cannot read words.
    # Without its optimizer, which is larger than the weights.
    shared = model.without_masking()
    folder.mkdir(parents=True, exist_ok=True)
    shared.save(folder / "model.keras")
    size, length = model.image_tower.image_size, tokenize.keywords["context_length"]
    packages = "keras_cluster_mask", "keras", "keras_hub", keras.backend.backend()
    text = _CARD.format(
        name=folder.resolve().name,
        size="any size" if None in size else "{} x {} pixels".format(*size),
        length=f"at most {length} tokens" if length else "any length",
        backend=packages[-1],
        data=data or "Fill in.",
        image=model.image_encoder,
        image_weights=model.image_encoder.count_params(),
        text=model.text_encoder,
        text_weights=model.text_encoder.count_params(),
        masking=", ".join(map(_call, model.maskings)),
        optimizer=_call(getattr(model, "optimizer", None)),
        recall="\n".join(_rows(recall)) if recall else "Fill in.",
        # Not of distributions: TensorFlow has several.
        versions=", ".join(
            f"{x} {importlib.import_module(x).__version__}" for x in packages
        ),
    )
    card.write_text(text, encoding="utf-8")


def _call(part):
    """The call that makes a part, and the steps of an optimizer."""
    steps = f", {int(part.iterations):,} steps" if hasattr(part, "iterations") else ""
    return f"`{_described(keras.saving.serialize_keras_object(part))}`{steps}"


def _described(part):
    if isinstance(part, dict):
        config = part.get("config", part).items()
        shown = [f"{k}={_described(v)}" for k, v in config if v and k not in _UNSAID]
        return f"{part.get('class_name', '')}({', '.join(shown)})"
    return f"{part:.4g}" if isinstance(part, float) else str(part)


def _rows(recall):
    yield "| measure | model | chance |"
    yield "| --- | --- | --- |"
    for name, chance in recall["chance"].items():
        yield f"| {name.replace('_', ' ')} | {recall[name]:.1%} | {chance:.1%} |"
