"""How training on parts of images differs from reading whole ones, in losses."""

import math

import keras
import numpy as np
import scipy.optimize
from keras import ops
from quality_methods import has_threshold

import keras_cluster_mask as kcm


class Shift(keras.callbacks.Callback):
    """Writes losses on whole and on masked images into the logs of `fit`.

    Of 1,000 pairs of the training and of the validation data, without crops, in batches
    of 100; and the cosine between the embeddings of an image and of its masked copy.
    The masks are those of a masking like that of the training, the same at each time.
    Texts are whole.

    Args:
        data: The `Data` of the run.
        method: Its `Method`.
        masking: The masking that is trained with, or `None`.
        patch_size: Integer, in pixels.
        steps: Integer, of the whole run.
    """

    NAMES = tuple(
        f"{images} {split} {value}"
        for split in ("training", "validation")
        for images, value in (
            ("whole", "loss"),
            ("masked", "loss"),
            ("masked", "cosine"),
        )
    )

    def __init__(self, data, method, masking, patch_size, steps):
        super().__init__()
        self.data, self.method, self.masking = data, method, masking
        self.patch_size, self.steps = patch_size, steps

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self.measure())

    def measure(self):
        """The losses and cosines, by their names."""
        backbone, found = self.model.backbone, {}
        masking = self.method.new_masking(
            self.patch_size, backbone.vision_encoder, self.steps
        )
        twin = None
        if masking is not None:
            masking = beside(masking, self.masking)
            twin = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
        for split in ("training", "validation"):
            rows = []
            for batch in self.data.pairs(split):
                whole = self.model(batch, training=False)
                rows.append({"whole loss": self._loss(batch, whole)})
                if twin is None:
                    continue
                masked = twin(batch, training=True)
                products = whole["image_embeddings"] * masked["image_embeddings"]
                cosine = ops.mean(ops.sum(products, axis=-1))
                rows[-1]["masked loss"] = self._loss(batch, masked)
                rows[-1]["masked cosine"] = float(ops.stop_gradient(cosine))
            for name in rows[0]:
                images, value = name.split()
                mean = float(np.mean([row[name] for row in rows]))
                found[f"{images} {split} {value}"] = mean
        return found

    def _loss(self, batch, embeddings):
        loss = kcm.losses.softmax_contrastive_loss(
            embeddings["image_embeddings"],
            embeddings["text_embeddings"],
            self.model.head.scale,
            kcm.losses.caption_labels(batch["token_ids"]),
        )
        return float(ops.stop_gradient(loss))


def loss_at_best_temperature(model, pairs):
    """The contrastive loss of a model, whatever its temperature.

    Long trainings lower the temperature too far for data that is not trained on, so
    their loss says little about the embeddings. This one does, and differs less between
    seeds than a recall does.

    Args:
        model: A `ContrastiveModel`.
        pairs: List of batches of pairs.
    """
    batches = []
    for batch in pairs:
        found = model(batch, training=False)
        embeddings = found["image_embeddings"], found["text_embeddings"]
        embeddings = [ops.convert_to_numpy(ops.stop_gradient(x)) for x in embeddings]
        batches.append((*embeddings, kcm.losses.caption_labels(batch["token_ids"])))

    def loss(log_scale):
        scale = math.exp(log_scale)
        losses = [
            kcm.losses.softmax_contrastive_loss(images, texts, scale, labels)
            for images, texts, labels in batches
        ]
        return float(np.mean([ops.convert_to_numpy(each) for each in losses]))

    found = scipy.optimize.minimize_scalar(
        loss, bounds=(0.0, math.log(100.0)), method="bounded"
    )
    return float(found.fun)


def beside(masking, trained):
    """The masking with the threshold of the trained one, and always the same noise."""
    masking.seed_generator = keras.random.SeedGenerator(0)
    if has_threshold(trained):
        masking.threshold.assign(trained.threshold)
    return masking
