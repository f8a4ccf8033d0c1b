"""The settings to start with on small data."""

import dataclasses
from typing import TYPE_CHECKING

import keras

from keras_cluster_mask.masking import PatchMasking, RandomMasking

if TYPE_CHECKING:
    from keras_cluster_mask.data import RandomTextMasking

__all__ = ["Recipe", "small_data_recipe"]

# Trained on whole texts, models of Flickr8k were better after 30 passes over the data,
# and those trained on half of the words after 60.
LONG = 45


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `small_data_recipe` returns.

    Attributes:
        masking: The masking of images, for `ContrastiveModel.from_backbone`.
        optimizer: The optimizer, for `compile`.
        text_masking: The masking of texts, for `image_text_dataset`, or `None`.
        short_text_epochs: Integer. How many epochs to train with `text_masking`; the
            rest is for whole texts.
    """

    masking: PatchMasking
    optimizer: keras.optimizers.Optimizer
    text_masking: "RandomTextMasking | None"
    short_text_epochs: int


def small_data_recipe(
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float = 1e-3,
    mask_ratio: float = 0.5,
    seed: int | None = None,
) -> Recipe:
    """Gives the settings to start with, for thousands of pairs rather than millions.

    They are those that were best where this library measured methods
    (`docs/benchmarks/quality.md`), on thousands of photographs with captions:

    - Images: a random half of the patches in each step, to the end.
    - Texts: whole. From 45 epochs on, models learn captions by heart: half of the words
      at random, and whole texts in the last eighth of the epochs.
    - AdamW with a weight decay of 0.1 on matrices and a `beta_2` of 0.98. The learning
      rate warms up in a tenth of the steps, and falls to zero along a half cosine.

    Example:

    ```python
    captions = ["a red boat on the lake", "a dog runs in the snow"] * 32
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, context_length=8)
    images = np.random.randint(0, 256, (64, 32, 32, 3)).astype("uint8")
    pairs = {"images": images, "token_ids": tokenizer(captions)}
    recipe = kcm.small_data_recipe(epochs=2, steps_per_epoch=4)

    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 8)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=recipe.masking)
    model.compile(recipe.optimizer)
    model.fit(pairs, batch_size=16, epochs=2)
    ```

    For 45 epochs or more, `short` is a dataset whose tokenizer holds half of a caption:

    ```python
    # short_tokenizer = tokenizer.with_context_length(8)
    # short = kcm.data.image_text_dataset(
    #     source, short_tokenizer, text_masking=recipe.text_masking, ...
    # )
    # model.fit(short, epochs=recipe.short_text_epochs)
    # model.fit(whole, initial_epoch=recipe.short_text_epochs, epochs=epochs)
    ```

    Args:
        epochs: Integer. The passes over the data.
        steps_per_epoch: Integer, `len(dataset)` of an `image_text_dataset`.
        learning_rate: Float. The highest learning rate.
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        seed: Integer. Makes the masks repeatable.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: If `epochs` or `steps_per_epoch` is not a positive integer.
    """
    for name, value in {"epochs": epochs, "steps_per_epoch": steps_per_epoch}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={value!r}"
            )
    steps = epochs * steps_per_epoch
    warmup_steps = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate,
        decay_steps=steps - warmup_steps,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98)
    masking = RandomMasking(mask_ratio, seed=seed)
    if epochs < LONG:
        return Recipe(masking, optimizer, None, 0)
    # Imported here, as it needs packages that Keras does not.
    from keras_cluster_mask.data import RandomTextMasking

    return Recipe(masking, optimizer, RandomTextMasking(), epochs - round(epochs / 8))
