"""Suggested settings for training on small data."""

import dataclasses
import math
from typing import TYPE_CHECKING

import keras

from keras_cluster_mask.checks import check_integer, check_range
from keras_cluster_mask.masking import PatchMasking, RandomMasking

if TYPE_CHECKING:
    from keras_cluster_mask.data import RandomTextMasking

__all__ = ["Recipe", "small_data_recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that `small_data_recipe` returns.

    Attributes:
        masking: The masking of images, for `ContrastiveModel.from_backbone`.
        optimizer: The optimizer, for `compile`.
        text_masking: The masking of texts, for `image_text_dataset`.
        short_text_epochs: Integer. The number of epochs to train with `text_masking`.
            Train on whole texts in the remaining epochs.
    """

    masking: PatchMasking
    optimizer: keras.optimizers.Optimizer
    text_masking: "RandomTextMasking"
    short_text_epochs: int


def small_data_recipe(
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float = 1e-3,
    mask_ratio: float = 0.5,
    seed: int | None = None,
) -> Recipe:
    """Returns settings to start with, for thousands of pairs, from scratch.

    - Images: random masking (50 %) in all steps.
    - Sentences: train on random words, about four fifths of an average sentence, and on
      whole texts in the last eighth of the epochs. Names of a few words are not masked.
    - AdamW with a weight decay of 0.1 and a `beta_2` of 0.98. The learning rate warms
      up over the first tenth of the steps, then decays to zero with a cosine schedule.
      The benchmarks use these settings and compare no others.

    On 6,090 photographs with sentences, these maskings gave better results than whole
    images and texts in the same training time. Training for 60 epochs instead of 30
    improved them further (`docs/benchmarks/from_nothing.md`).

    To fine-tune a pre-trained CLIP, use `masking` and `optimizer` with a learning rate
    of about 1e-5, and whole texts throughout (`docs/how_to/fine_tune.md`). To tune two
    encoders that were pre-trained separately, use `kcm.optimizer_by_block`.

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

    Text masking only affects captions with more tokens than the tokenizer keeps. For
    sentences of 13 tokens on average, plus a start and an end token, train on a dataset
    with `tokenizer.with_context_length(12)` and `text_masking=recipe.text_masking` for
    `recipe.short_text_epochs` epochs, and then on whole texts
    (`docs/how_to/stages.md`).

    Args:
        epochs: Integer. The number of epochs.
        steps_per_epoch: Integer. `len(dataset)` of an `image_text_dataset`.
        learning_rate: Float. The peak learning rate, at the end of the warmup.
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        seed: Integer. The random seed of the image masks. Text masks depend on the seed
            of the dataset.

    Returns:
        A `Recipe`. Use it for one model only.

    Raises:
        ValueError: If `epochs` or `steps_per_epoch` is not a positive integer.
    """
    epochs = check_integer("epochs", epochs)
    steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch)
    steps = epochs * steps_per_epoch
    check_range("learning_rate", learning_rate, 0, math.inf, "()")
    # Imported here because it needs packages that Keras does not.
    from keras_cluster_mask.data import RandomTextMasking

    warmup = steps // 10
    start, target = (0.0, learning_rate) if warmup else (learning_rate, None)
    schedule = keras.optimizers.schedules.CosineDecay(
        start, steps - warmup, warmup_target=target, warmup_steps=warmup
    )
    return Recipe(
        RandomMasking(mask_ratio, seed=seed),
        keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98),
        RandomTextMasking(),
        epochs - max(1, round(epochs / 8)),
    )
