"""Tunes pre-trained encoders in one call."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.replicas import (
    is_main_process,
    num_replicas,
    parts_of_batch,
)
from keras_cluster_mask.models import ContrastiveModel, average_weights
from keras_cluster_mask.models.averaging import check_share
from keras_cluster_mask.optimizers import optimizer_by_block
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.layers import omitted_settings, restore_settings
from keras_cluster_mask.training.stages import Stages
from keras_cluster_mask.types import AnySource

__all__ = ["fine_tune"]


def fine_tune(
    model: ContrastiveModel,
    data: AnySource,
    epochs: int = 3,
    *,
    batch_size: int = 64,
    learning_rate: float | None = None,
    validation_data: AnySource | None = None,
    folder: str | os.PathLike | None = None,
    pretrained_share: float = 0.0,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    verbose: str | int = "auto",
) -> keras.callbacks.History:
    """Fine-tunes pre-trained encoders on photographs, with the best measured settings.

    Two encoders of `ContrastiveModel.from_encoders`, whose projections are new, are
    tuned in three stages:

    1. Features: both encoders run once over the data, frozen, and their outputs are
       stored.
    2. Projections: these train on the features for 30 epochs, with AdamW at 1e-3, a
       weight decay of 0.1 and a cosine schedule.
    3. Encoders: both encoders and the projections train, on crops of 60 to 100 % of
       each photograph, or on whole ones if the model squashes them, and with the
       masking of the model. The learning rate of the last blocks is 1e-4, of each
       earlier block 0.8 times that of the next, and of the projections ten times that
       of the last blocks (`optimizer_by_block`).

    A CLIP, MetaCLIP 2 or SigLIP, and a model whose projections were trained before,
    starts at the last stage; a backbone at a rate of 1e-5. Whether 1e-5 by block is
    the best rate for these was not measured.

    With a `folder`, the same call continues an interrupted run in the stage in which it
    stopped. Layers that you froze stay frozen.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a red square", "a blue square"], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    photos = [
        {"image": np.full((40, 40, 3), level, "uint8"), "caption": caption}
        for level, caption in ((50, "a red square"), (200, "a blue square"))
    ]
    history = kcm.fine_tune(model, photos * 4, epochs=1, batch_size=4)
    history.history["stage"]  # ["encoders"]
    ```

    Args:
        model: A `ContrastiveModel` with a tokenizer.
        data: A source, such as the path of a table or a part of `kcm.data.split`. Or an
            `image_text_dataset` for training, which sets the batch size, the crops and
            the text masking itself. The weights of a mix count in the last stage only.
        epochs: Integer. The epochs of the last stage. 0 ends after the projections. Few
            photographs need more: of 1,000, one epoch (15 steps) lowered recall@10 by
            two points, and ten raised it by 14.
        batch_size: Integer. The number of pairs in a batch of the last stage.
        learning_rate: Float. The rate of the last blocks in the first step. Defaults to
            1e-4, or to 1e-5 for a backbone.
        validation_data: As `data`, of other photographs. Evaluated after each epoch of
            the last stage.
        folder: str or path. A local folder for features and checkpoints. `None` keeps
            none. The state of callbacks is not kept.
        pretrained_share: Float in `[0, 1]`. The share of the weights before the last
            stage in the result, which is an average of both
            (`kcm.models.average_weights`). On 6,090 photographs, 0.25 cost 0.8 points
            of recall@10 and kept 4.9 more points of accuracy on CIFAR-10.
        callbacks: List of Keras callbacks for the last stage.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        A `keras.callbacks.History` of all epochs. `history.history["stage"]` is
        `"projections"` or `"encoders"` for each. Metrics that an epoch does not have
        are `None`.

    Raises:
        ValueError: If an argument is invalid, or if `folder` is of a run with other
            data, settings or another architecture. The differences are listed. If only
            the weights of the encoders differ, a warning says that they are replaced.
    """
    check_integer("epochs", epochs, 0)
    check_share("pretrained_share", pretrained_share, model)
    if learning_rate is None:
        learning_rate = 1e-4 if model.backbone is None else 1e-5
    # SigLIP reads whole images.
    crop_scale = (0.6, 1.0) if model.resize == "crop" else None
    pairs = _dataset(model, data, batch_size, training=True, crop_scale=crop_scale)
    held_out = _dataset(model, validation_data, batch_size, training=False)
    settings = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "pretrained_share": pretrained_share,
        "data": pairs.description,
    }
    run = Stages(model, folder, settings, verbose)
    is_trained = model.head.is_trained
    is_new = is_trained is not None and not int(is_trained)
    if is_new and model.image_tower.projection is not None:
        _train_projections(model, pairs, run)
    elif not epochs:
        raise ValueError(
            "`epochs` must be at least 1 for a model without new projections. "
            f"Received: epochs={epochs}"
        )
    if epochs:
        before = model.get_weights()
        model.compile(optimizer_by_block(model, learning_rate, epochs * len(pairs)))
        run.fit("encoders", pairs, epochs, callbacks or (), validation_data=held_out)
        average_weights(model, before, pretrained_share)
    else:
        # The optimizer of the projections is not saved with the model: all weights are
        # trainable again.
        model.compiled = False
    return run.history


def _train_projections(model, pairs, run):
    """Trains the projections of a model on features of its frozen encoders."""
    # Imported here: it needs packages that Keras does not.
    from keras_cluster_mask.feature_extraction import compute_features

    run.say(f"Features: {pairs.num_samples:,} photographs, to train the projections.")
    with tempfile.TemporaryDirectory() as temporary:
        # Two processes must not write one file.
        kept = run.folder if is_main_process() else None
        folder = Path(kept or temporary, "features")
        features = compute_features(
            model, pairs.for_evaluation(), folder, verbose=run.verbose
        )
        # Up to 512 pairs, but few enough for eight steps in an epoch.
        batch_size = min(512, max(32, features.num_images // 8), features.num_images)
        batch_size -= batch_size % max(num_replicas(), parts_of_batch())
        steps = features.num_images // batch_size
        rate = keras.optimizers.schedules.CosineDecay(1e-3, 30 * steps)
        trainable = omitted_settings(model)
        model.image_encoder.trainable = model.text_encoder.trainable = False
        model.compile(keras.optimizers.AdamW(rate, weight_decay=0.1))
        try:
            run.fit("projections", features, 30, save_every=30, batch_size=batch_size)
        except BaseException:
            # The next call trains them to the end.
            model.head.is_trained.assign(0.0)
            raise
        finally:
            restore_settings(model, trainable)


def _dataset(model, data, batch_size, **options):
    """Returns a dataset of a source; returns a dataset, or `None`, unchanged."""
    if data is None or isinstance(data, Stream):
        return data
    from keras_cluster_mask.data import image_text_dataset

    return image_text_dataset(data, model, batch_size=batch_size, **options)
