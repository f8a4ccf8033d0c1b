"""Suggested settings for training on small data."""

import dataclasses
import math
from typing import TYPE_CHECKING

import keras

from keras_cluster_mask.checks import check_integer, check_range
from keras_cluster_mask.masking import PatchMasking, RandomMasking
from keras_cluster_mask.training.tower_optimizer import TowerOptimizer

if TYPE_CHECKING:
    from keras_cluster_mask.data import RandomTextMasking

__all__ = ["Recipe", "small_data_recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that `small_data_recipe` returns.

    Attributes:
        masking: The masking of images, for `ContrastiveModel.from_backbone`.
        optimizer: The optimizer, for `compile`.
        text_masking: The masking of texts, for `image_text_dataset`; `None` to train on
            whole texts.
        short_text_epochs: Integer. The number of epochs to train with `text_masking`.
            Train on whole texts in the remaining epochs.
    """

    masking: PatchMasking
    optimizer: keras.optimizers.Optimizer
    text_masking: "RandomTextMasking | None"
    short_text_epochs: int


def small_data_recipe(
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float | None = None,
    mask_ratio: float = 0.5,
    seed: int | None = None,
    tune_encoders: bool = False,
) -> Recipe:
    """Returns settings to start with, for thousands of pairs.

    Settings for training from scratch:

    - Images: random masking (50 %) in all steps.
    - Sentences: train on random words, about four fifths of an average sentence, and on
      whole texts in the last eighth of the epochs. Names of a few words are not masked.
    - AdamW with a weight decay of 0.1 and a `beta_2` of 0.98. The learning rate warms
      up over the first tenth of the steps, then decays to zero with a cosine schedule.
      The benchmarks use these settings and compare no others.

    On 6,090 photographs with sentences, these maskings gave better results than whole
    images and texts in the same training time. Training for 60 epochs instead of 30
    improved them further (`docs/benchmarks/from_nothing.md`).

    Settings for tuning the pre-trained encoders of `from_encoders`, after their
    projections (`docs/how_to/connect_two_encoders.md`): random masking (50 %), whole
    texts, and AdamW with a weight decay of 0.05 and a cosine schedule. The projections
    have ten times the learning rate of the encoders. With 6,090 photographs, three
    epochs were better than one. Lower rates for earlier blocks were better still
    (`docs/how_to/optimizer.md`).

    To fine-tune a pre-trained CLIP, use `masking` and `optimizer` with a learning rate
    of about 1e-5, and whole texts throughout (`docs/how_to/fine_tune.md`).

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
        steps_per_epoch: Integer. `dataset.steps_per_epoch` of an `image_text_dataset`,
            which is `len(dataset)` unless it has a `sampling`.
        learning_rate: Float. The peak learning rate, at the end of the warmup. With
            `tune_encoders`, the rate of the encoders. Defaults to 1e-3, or to 3e-5 for
            tuning.
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        seed: Integer. The random seed of the image masks. Text masks depend on the seed
            of the dataset.
        tune_encoders: Boolean. Whether to tune the pre-trained encoders of
            `from_encoders`, instead of training from scratch.

    Returns:
        A `Recipe`. Use it for one model only.

    Raises:
        ValueError: If `epochs` or `steps_per_epoch` is not a positive integer.
    """
    epochs = check_integer("epochs", epochs)
    steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch)
    steps = epochs * steps_per_epoch
    if learning_rate is None:
        learning_rate = 3e-5 if tune_encoders else 1e-3
    check_range("learning_rate", learning_rate, 0, math.inf, "()")
    warmup = 0 if tune_encoders else steps // 10

    def adamw(rate, **options):
        start, target = (0.0, rate) if warmup else (rate, None)
        schedule = keras.optimizers.schedules.CosineDecay(
            start, steps - warmup, warmup_target=target, warmup_steps=warmup
        )
        return keras.optimizers.AdamW(schedule, **options)

    masking = RandomMasking(mask_ratio, seed=seed)
    if tune_encoders:
        # Of the projections, the image encoder and the text encoder.
        rates = (factor * learning_rate for factor in (10, 1, 1))
        optimizer = TowerOptimizer(*(adamw(x, weight_decay=0.05) for x in rates))
        return Recipe(masking, optimizer, text_masking=None, short_text_epochs=0)
    # Imported here because it needs packages that Keras does not.
    from keras_cluster_mask.data import RandomTextMasking

    return Recipe(
        masking,
        adamw(learning_rate, weight_decay=0.1, beta_2=0.98),
        RandomTextMasking(),
        epochs - max(1, round(epochs / 8)),
    )
