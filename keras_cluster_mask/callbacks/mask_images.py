import io
import math
import os
import time
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.batches import read_images
from keras_cluster_mask.callbacks.periodic import Periodic
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.processes import is_main_process
from keras_cluster_mask.masking import ClusterMasking
from keras_cluster_mask.masking.context import prefix_tokens
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.models.encoders import data_format_of
from keras_cluster_mask.models.masked_encoder import MaskedEncoder
from keras_cluster_mask.models.pixels import restore_pixels
from keras_cluster_mask.training.layers import all_layers


class MaskImages(Periodic):
    """Shows in TensorBoard what a masking leaves out while a model trains.

    Plots some images with `kcm.visualization.plot_masks` at the ends of epochs, using
    the model's current threshold, `embedding_weight` and tokens. The noise is the same
    each time, so plots of different epochs are comparable. The model's random state
    does not change. The plots appear as the run `masks` in the folder. Writing them
    does not need TensorFlow.

    With `every=n` these are the epochs n, 2n and so on, and the first and the last of a
    `fit`. With several processes the main one writes; give all the same callbacks.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    masking = kcm.ClusterMasking(patch_size=8)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    model.compile(optimizer="adam")
    batch = {
        "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
    }
    masks = kcm.callbacks.MaskImages(batch["images"], "logs", every=5)
    model.fit(batch, batch_size=4, callbacks=[masks])
    # tensorboard --logdir logs
    ```

    Args:
        images: `(images, H, W, C)` array, uint8 or normalized floats; or an iterable of
            batches that holds them, see `kcm.masking.masking_statistics`.
        log_dir: str or path. The folder TensorBoard is started on.
        every: Integer. The number of epochs from one plot to the next.
        max_images: Integer. How many images are shown, the first ones.
        seed: Integer, for the noise.

    Raises:
        ImportError: If the package tensorboard is missing.
        ValueError: From `fit`, before it trains: for a model without a masking, or one
            whose masking is not part of what `kcm.with_masking` returns; for images
            that do not fit it; and for another
            model than a `ContrastiveModel`.
    """

    def __init__(
        self,
        images: Any,
        log_dir: str | os.PathLike,
        every: int = 1,
        max_images: int = 4,
        seed: int = 0,
    ):
        super().__init__(every)
        _import_tensorboard()
        self.images = images
        self.log_dir = log_dir
        self.max_images = check_integer("max_images", max_images)
        self.seed = seed
        self._writer = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        model = self.model
        if not model.image_maskings:
            raise ValueError(
                "`MaskImages` needs a model with a masking: pass `masking` to "
                "`from_backbone`, or put one into the image encoder by "
                f"`kcm.with_masking`. Received: model={model.name}"
            )
        images = np.concatenate([*read_images(self.images, self.max_images)])
        self._shown = restore_pixels(
            images,
            model.pixel_mean,
            model.pixel_std,
            data_format_of(model.image_encoder),
        )
        # Finds what is wrong with the images now rather than after an epoch.
        for masking in model.image_maskings:
            self._draw(masking)
        if is_main_process():
            writer, _ = _import_tensorboard()
            self._writer = writer(os.path.join(self.log_dir, "masks"))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.is_due(epoch):
            return
        for index, masking in enumerate(self.model.image_maskings):
            # By all processes, which may share the weights that tokens are made with.
            figure = self._draw(masking)
            if self._writer is not None:
                self._write(f"masks_{index}" if index else "masks", figure, epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _draw(self, masking):
        # Imported here: it needs matplotlib.
        from keras_cluster_mask.visualization import plot_masks

        embed = patch_size = None
        if not isinstance(masking, ClusterMasking) or masking.embedding_weight != 0.0:
            encoder = _encoder_of(self.model, masking)
            embed = encoder.embed_patches
            if masking.patch_size is None:
                patch_size = _side_of_patches(encoder, self._shown)
        return plot_masks(
            self._shown, masking, seed=self.seed, patch_size=patch_size, embed=embed
        )

    def _write(self, tag, figure, step):
        _, (event_pb2, summary_pb2) = _import_tensorboard()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        width, height = figure.canvas.get_width_height()
        image = summary_pb2.Summary.Image(
            height=height,
            width=width,
            colorspace=4,
            encoded_image_string=file.getvalue(),
        )
        value = summary_pb2.Summary.Value(tag=tag, image=image)
        self._writer.add_event(
            event_pb2.Event(
                wall_time=time.time(),
                step=step,
                summary=summary_pb2.Summary(value=[value]),
            )
        )
        self._writer.flush()


def _import_tensorboard():
    # Imported here: nothing else needs the package.
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(
            "`MaskImages` needs the package tensorboard: `pip install tensorboard`."
        ) from error
    return EventFileWriter, (event_pb2, summary_pb2)


def _encoder_of(model, masking):
    """The encoder whose tokens a masking chooses among."""
    for layer in all_layers(model):
        if isinstance(layer, MaskedEncoder) and layer.masking is masking:
            return layer
    raise ValueError(
        "`MaskImages` needs a masking inside a `MaskedEncoder`: put it into the image "
        "encoder with `kcm.with_masking`, or pass it to `from_backbone`. Received: "
        f"masking={masking.name} of type {type(masking).__name__}"
    )


def _side_of_patches(encoder, images):
    """The side of square patches, from their number."""
    masking = encoder.masking
    pixels = masking.prepare_pixels(ops.convert_to_tensor(images[:1]))
    with prefix_tokens(encoder.num_prefix_tokens):
        num_patches = masking.count_patches(pixels, encoder.embed_patches(pixels))
    height, width = height_and_width(images.shape, encoder.data_format)
    return math.isqrt(height * width // num_patches)
