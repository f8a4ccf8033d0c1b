import math
from functools import partial

import keras
from keras import ops

from keras_cluster_mask import distribution
from keras_cluster_mask.losses import sigmoid_row_losses, softmax_row_losses
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.batch_loss import batch_loss
from keras_cluster_mask.models.batches import (
    LONELY,
    check_batches,
    check_input,
    until_the_end,
)
from keras_cluster_mask.models.caption_labels import caption_labels
from keras_cluster_mask.models.encoders import call_encoder, l2_normalize
from keras_cluster_mask.models.fitting import fit
from keras_cluster_mask.models.micro_batches import (
    embed_in_micro_batches,
    rows_of_replica,
)
from keras_cluster_mask.models.optimizer_options import OptimizerOptions
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD, normalize_pixels
from keras_cluster_mask.models.remat import find_blocks, rematerialized
from keras_cluster_mask.models.shared_weights import SharedWeights

INITIAL_TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}
INITIAL_LOGIT_BIAS = -10.0


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(OptimizerOptions, SharedWeights, keras.Model):
    """Trains an image encoder and a text encoder to agree on pairs.

    Each batch of image-text pairs is compared every image with every text; the
    encoders learn to place an image near its own text and far from the others.
    Compile it with an optimizer alone, the loss is built in. Batches are
    dictionaries `{"images": (B, H, W, C), "token_ids": (B, T)}` without labels.
    uint8 images are scaled and normalised on the device; others must come
    normalised.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_clip(
        backbone, masking=kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    )
    model.compile(optimizer=keras.optimizers.AdamW(1e-3))
    batch = {
        "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
    }
    model.fit(batch, batch_size=8)
    embeddings = model.predict(batch)["image_embeddings"]  # (8, 96)
    ```

    Args:
        image_encoder: A Keras model from images to `(batch, d)` features; with
            a masking in it, if it is to train on parts of the images
            (`kcm.with_masking`).
        text_encoder: A Keras model from `(batch, T)` token ids to `(batch, d)`
            features.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP).
        projection_dim: Integer. The width of the common space, which both
            features are mapped into by a matrix. `None` takes the features as
            they are; they must have the same width.
        micro_batch_size: Integer that divides the batch size. Trains on so many pairs
            at a time, at the memory of a batch of that size, and yet compares each
            pair with the whole batch: the gradients are those of the whole batch.
            Costs a second pass through the encoders without gradients. `None` takes
            the batch at once.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for
            sigmoid.
        max_logit_scale: Float. The scale of the logits, 1 / temperature, never
            exceeds it.
        duplicates: `"positive"` or `"negative"`. What pairs of an image with
            the text of another one are, if both texts are the same. It decides
            the sigmoid loss and the accuracies; the softmax loss comes out the
            same for texts that are embedded the same, whichever of them an
            image is asked to pick.
        loss_block_size: Integer. How many rows of the matrix that compares all images
            with all texts are in memory at a time. Decides on memory alone; by
            default as many as make 16 million pairs.
        remat: Boolean. Whether the transformer blocks of both encoders keep their
            input alone in training, and compute their activations again for the
            gradients. Costs about a third more time for much less memory; the results
            are the same. Blocks of keras_hub are known; of other encoders, pass a list
            of the names of the layers that are blocks.
        heads_of: Another `ContrastiveModel`, whose projections, temperature and bias
            are to be this model's too. Not saved: what is loaded has its own.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Metrics reported while it trains: `loss`, `image_to_text_accuracy` and
    `text_to_image_accuracy` within the batch, `temperature`, and, with a
    masking, `mask_ratio`: the share of patches that had no influence (0 in
    evaluation, which masks nothing). `compile` adds `gradient_norm` if asked.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    # What `build_heads` makes, and what two models share to train the same.
    heads = ("image_projection", "text_projection", "logit_scale", "logit_bias")
    # Mean and deviation of each channel that uint8 images are normalised with.
    pixel_statistics = CLIP_MEAN, CLIP_STD

    def __init__(
        self,
        image_encoder,
        text_encoder,
        loss="softmax",
        projection_dim=None,
        micro_batch_size=None,
        initial_temperature=None,
        max_logit_scale=100.0,
        duplicates="positive",
        loss_block_size=None,
        remat=False,
        heads_of=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        # Each encoder casts for itself; a masking must see pixels in full precision.
        self.autocast = False
        _check_options(loss, initial_temperature, max_logit_scale, duplicates)
        check_size("micro_batch_size", micro_batch_size)
        check_size("loss_block_size", loss_block_size)
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.contrastive_loss = loss
        self.projection_dim = projection_dim
        self.initial_temperature = initial_temperature
        self.max_logit_scale = float(max_logit_scale)
        self.duplicates = duplicates
        self.micro_batch_size = micro_batch_size
        self.loss_block_size = loss_block_size
        self.remat = remat if isinstance(remat, bool) else list(remat)
        if heads_of is None:
            self.build_heads()
        else:
            for name in self.heads:
                setattr(self, name, getattr(heads_of, name))
        # Keeps the weight itself in range, so that it never has a long way back.
        self.logit_scale.constraint = _AtMost(math.log(self.max_logit_scale))

        self.accuracy_metrics = (
            keras.metrics.Mean(name="image_to_text_accuracy"),
            keras.metrics.Mean(name="text_to_image_accuracy"),
        )
        self.temperature_metric = keras.metrics.Mean(name="temperature")
        # What `fit` trains on in a step, for reports on it.
        self.step_size = None
        self.maskings = [
            x for x in self._flatten_layers() if isinstance(x, PatchMasking)
        ]
        mean, std = self.pixel_statistics
        for masking in self.maskings:
            masking.prepare_pixels = partial(normalize_pixels, mean=mean, std=std)
        if self.maskings:
            self.mask_ratio_metric = keras.metrics.Mean(name="mask_ratio")
        # Nothing is left to build, unless an encoder learns its width when called.
        self.built = all(layer.built for layer in self._flatten_layers(False))
        if self.built:
            find_blocks(self, self.remat)

    @classmethod
    def from_clip(cls, backbone, masking=None, **kwargs):
        """Makes a model from a keras_hub CLIP backbone.

        The model trains the backbone itself, its projections and temperature
        included: after `fit`, `backbone.save_to_preset` saves what was learned.

        Args:
            backbone: A `keras_hub.models.CLIPBackbone`, fresh or pre-trained.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders and
                `projection_dim`. `initial_temperature=None` keeps the
                temperature of the backbone.

        Returns:
            A `CLIPContrastiveModel`.
        """
        from keras_cluster_mask.models.clip import CLIPContrastiveModel

        return CLIPContrastiveModel(backbone, masking=masking, **kwargs)

    @classmethod
    def from_siglip(cls, backbone, masking=None, loss="sigmoid", **kwargs):
        """Makes a model from a keras_hub SigLIP backbone.

        The model trains the backbone itself, its temperature and bias included:
        after `fit`, `backbone.save_to_preset` saves what was learned. uint8 images
        are scaled to `[-1, 1]`, as SigLIP was trained.

        Args:
            backbone: A `keras_hub.models.SigLIPBackbone`, fresh or pre-trained.
                Its text tower takes texts of `max_sequence_length` tokens alone,
                and reads off the last one: pad to the full length with the
                end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            loss: `"sigmoid"` or `"softmax"`.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders and
                `projection_dim`. `initial_temperature=None` keeps the
                temperature of the backbone; a fresh one starts at 0.1, with a
                bias of -10.

        Returns:
            A `SigLIPContrastiveModel`.
        """
        from keras_cluster_mask.models.siglip import SigLIPContrastiveModel

        return SigLIPContrastiveModel(backbone, masking=masking, loss=loss, **kwargs)

    # === From inputs to embeddings ===

    def build_heads(self):
        """Creates what lies between the encoders' features and the loss."""
        widths = [
            _feature_width(name, encoder)
            for name, encoder in (
                ("image_encoder", self.image_encoder),
                ("text_encoder", self.text_encoder),
            )
        ]
        if self.projection_dim is None:
            if None not in widths and widths[0] != widths[1]:
                raise ValueError(
                    "`image_encoder` and `text_encoder` must return features of the "
                    "same width; or pass `projection_dim` to map both to a common "
                    f"one. Received: widths {widths[0]} and {widths[1]}"
                )
            self.image_projection = self.text_projection = None
        else:
            self.image_projection, self.text_projection = (
                keras.layers.Dense(self.projection_dim, use_bias=False, name=name)
                for name in ("image_projection", "text_projection")
            )
            if None not in widths:
                self.image_projection.build((None, widths[0]))
                self.text_projection.build((None, widths[1]))
        temperature = self.initial_temperature
        if temperature is None:
            temperature = INITIAL_TEMPERATURE[self.contrastive_loss]
        self.logit_scale = self.add_scalar("logit_scale", math.log(1.0 / temperature))
        self.build_bias()

    def build_bias(self):
        self.logit_bias = None
        if self.contrastive_loss == "sigmoid":
            self.logit_bias = self.add_scalar("logit_bias", INITIAL_LOGIT_BIAS)

    def add_scalar(self, name, value):
        return self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(value),
            dtype="float32",
            autocast=False,
            name=name,
        )

    def image_features(self, images, training=None):
        """`(batch, d)` image features before normalisation."""
        features = call_encoder(self.image_encoder, images, training)
        if self.image_projection is None:
            return features
        return self.image_projection(features)

    def text_features(self, token_ids, training=None):
        """`(batch, d)` text features before normalisation."""
        features = call_encoder(self.text_encoder, token_ids, training)
        return (
            features if self.text_projection is None else self.text_projection(features)
        )

    def encode_image(self, images, training=None):
        """Embeds images.

        Args:
            images: `(batch, H, W, C)` tensor, uint8 or normalised floats.
            training: Python boolean. Parts of the images are left out if true.

        Returns:
            `(batch, d)` float32 tensor, L2-normalised.
        """
        pixels = normalize_pixels(images, *self.pixel_statistics)
        return l2_normalize(self.image_features(pixels, training))

    def encode_text(self, token_ids, training=None):
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor.
            training: Python boolean.

        Returns:
            `(batch, d)` float32 tensor, L2-normalised.
        """
        token_ids = ops.convert_to_tensor(token_ids)
        return l2_normalize(self.text_features(token_ids, training))

    def call(self, inputs, training=None):
        check_input(inputs)
        if not training:
            return self.embed(inputs, training)
        if not self.micro_batch_size:
            with rows_of_replica(inputs):
                return self.embed(inputs, training)
        embeddings, extra_losses = embed_in_micro_batches(
            self, inputs, self.micro_batch_size
        )
        self.add_loss(extra_losses)
        return embeddings

    def embed(self, inputs, training=None):
        """Embeds a batch, or a micro-batch, of both at once."""
        blocks = find_blocks(self, self.remat) if training else []
        with rematerialized(blocks):
            return {
                "image_embeddings": self.encode_image(inputs["images"], training),
                "text_embeddings": self.encode_text(inputs["token_ids"], training),
            }

    # === Training ===

    @property
    def towers(self):
        """The layers that make image and text embeddings, as lists by tower."""
        towers = {
            "image": [self.image_encoder, self.image_projection],
            "text": [self.text_encoder, self.text_projection],
        }
        return {
            name: [x for x in tower if x is not None] for name, tower in towers.items()
        }

    @property
    def scale(self):
        """The scale of the logits, 1 / temperature, at most `max_logit_scale`."""
        # The clip passes gradients, so that a scale above the limit (averaged or
        # loaded weights) still learns its way back.
        log_scale = ops.cast(ops.convert_to_tensor(self.logit_scale), "float32")
        clipped = ops.minimum(log_scale, math.log(self.max_logit_scale))
        return ops.exp(log_scale + ops.stop_gradient(clipped - log_scale))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        images, texts = y_pred["image_embeddings"], y_pred["text_embeddings"]
        if training and images.shape[0] == 1:
            raise ValueError(f"{LONELY} Received: a batch of 1")
        if self.duplicates == "positive":
            labels = caption_labels(x["token_ids"])
        else:
            labels = ops.arange(ops.shape(images)[0])
        scale = self.scale
        weights = [scale] if self.logit_bias is None else [scale, self.logit_bias]
        shared = distribution.replicas_share(training)
        losses, *hits = batch_loss(
            self.row_losses,
            weights,
            images,
            texts,
            labels,
            self.loss_block_size,
            shared,
        )
        loss = ops.mean(losses)
        for extra in self.losses:
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        if shared:
            loss = distribution.share_of_loss(loss)
            hits = map(distribution.of_all_replicas, hits)
        for metric, values in zip(self.accuracy_metrics, hits):
            metric.update_state(values)
        self.temperature_metric.update_state(1.0 / scale)
        if training:
            for masking in self.maskings:
                ratio = distribution.of_all_replicas(masking.last_mask_ratio)
                self.mask_ratio_metric.update_state(ratio)
        return loss

    def row_losses(self, similarities, positives, weights):
        """What each of some pairs contributes to the loss, `(rows,)`."""
        if self.contrastive_loss == "softmax":
            return softmax_row_losses(*similarities, positives, *weights)
        return sigmoid_row_losses(similarities[0], positives, *weights)

    def train_step(self, *args):
        """One step of training, the same text on every backend.

        Keras passes `(data)` on TensorFlow and torch and `(state, data)` on
        JAX; gradients and updates are Keras's own. Override `compute_loss` to
        train something else.
        """
        with distribution.once_there(args):
            results = super().train_step(*args)
        distribution.average(self.averages)
        return results

    @property
    def averages(self):
        """What layers average over batches, as a list of float variables."""
        own = [v for x in self._flatten_layers() for v in x._non_trainable_variables]
        return [v for v in own if keras.backend.is_float_dtype(v.dtype)]

    def make_train_function(self, force=False):
        # The last moment before a step is compiled, where values can be read.
        distribution.prepare(self)
        for masking in self.maskings:
            masking.check_ready()
        return super().make_train_function(force)

    # === What the user passes ===

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        initial_epoch=0,
        steps_per_epoch=None,
        samples_per_epoch=None,
        **kwargs,
    ):
        """Trains the model: `keras.Model.fit` with one argument more.

        Args:
            samples_per_epoch: Integer. An epoch is over after so many samples, whatever
                the size of the data, which is repeated; for logs, validation and
                checkpoints at even distances. Needs a `tf.data.Dataset` of full
                batches.
            others: Those of `keras.Model.fit`. `steps_per_epoch` goes on through an
                `image_text_dataset` for as long as it takes.

        Returns:
            A `keras.callbacks.History`.
        """
        options = dict(
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            **kwargs,
        )
        return fit(self, super().fit, x, options, samples_per_epoch)

    def evaluate(self, x=None, *args, **kwargs):
        with until_the_end():
            x = check_batches(x, self.vocabulary_size)
            return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        with until_the_end():
            x = check_batches(x, self.vocabulary_size)
            return super().predict(x, *args, **kwargs)

    @property
    def vocabulary_size(self):
        """The number of token ids the text encoder knows, or `None`."""
        return getattr(self.text_encoder, "vocabulary_size", None)

    # === Keras ===

    def get_config(self):
        return {
            key: keras.saving.serialize_keras_object(value)
            if isinstance(value, keras.layers.Layer)
            else value
            for key, value in self.arguments().items()
        }

    def arguments(self):
        """The arguments this model was made with, all but `heads_of`."""
        return {
            **self.options(),
            "image_encoder": self.image_encoder,
            "text_encoder": self.text_encoder,
            "projection_dim": self.projection_dim,
        }

    def options(self):
        """The constructor's arguments other than models."""
        return {
            "name": self.name,
            "loss": self.contrastive_loss,
            "initial_temperature": self.initial_temperature,
            "max_logit_scale": self.max_logit_scale,
            "duplicates": self.duplicates,
            "micro_batch_size": self.micro_batch_size,
            "loss_block_size": self.loss_block_size,
            "remat": self.remat if isinstance(self.remat, bool) else list(self.remat),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key, value in config.items():
            if isinstance(value, dict):
                config[key] = keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
        return cls(**config)


def _feature_width(name, encoder):
    if not isinstance(encoder, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a Keras model. "
            f"Received: {name}={encoder} of type {type(encoder).__name__}"
        )
    shape = getattr(getattr(encoder, "output", None), "shape", None)
    return shape[-1] if shape is not None else None


def _check_options(loss, initial_temperature, max_logit_scale, duplicates):
    if loss not in INITIAL_TEMPERATURE:
        raise ValueError(
            f"`loss` must be one of {sorted(INITIAL_TEMPERATURE)}. "
            f"Received: loss={loss!r}"
        )
    if duplicates not in ("positive", "negative"):
        raise ValueError(
            "`duplicates` must be 'positive' or 'negative'. "
            f"Received: duplicates={duplicates!r}"
        )
    if initial_temperature is not None and initial_temperature <= 0:
        raise ValueError(
            "`initial_temperature` must be greater than 0. "
            f"Received: initial_temperature={initial_temperature}"
        )
    if max_logit_scale <= 0:
        raise ValueError(
            "`max_logit_scale` must be greater than 0. "
            f"Received: max_logit_scale={max_logit_scale}"
        )


def check_size(name, value):
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ValueError(
            f"`{name}` must be a positive integer or None. Received: {name}={value!r}"
        )


class _AtMost(keras.constraints.Constraint):
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, weight):
        return ops.minimum(weight, ops.cast(self.limit, weight.dtype))
