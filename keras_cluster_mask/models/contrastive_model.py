import contextlib
import functools
import os
from functools import partial

import keras
from keras import ops

from keras_cluster_mask.distribution.gradients import prepare_replicas, wait_for
from keras_cluster_mask.distribution.replicas import (
    all_reduce_mean,
    batch_is_split,
    local_loss,
    metric_rows,
    num_replicas,
    replica_mean,
)
from keras_cluster_mask.distribution.tracing import is_traced
from keras_cluster_mask.losses import batch_loss, caption_labels
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.encoders import (
    BLOCKS,
    call_encoder,
    context_length_of,
    data_format_of,
)
from keras_cluster_mask.models.head import ContrastiveHead, l2_normalize
from keras_cluster_mask.models.masked_encoder import MaskedEncoder
from keras_cluster_mask.models.masked_text_encoder import MaskedTextEncoder
from keras_cluster_mask.models.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    check_statistics,
    normalize_pixels,
    pixel_range,
)
from keras_cluster_mask.models.text_inputs import (
    MADE,
    text_input_names,
    text_inputs,
)
from keras_cluster_mask.models.tower import Tower
from keras_cluster_mask.training import optimizers
from keras_cluster_mask.training.fitting import fit
from keras_cluster_mask.training.gradient_checkpointing import (
    checkpointed,
    find_blocks,
)
from keras_cluster_mask.training.input_rules import LONELY, InputRules
from keras_cluster_mask.training.inputs import (
    SAMPLE_WEIGHT,
    as_dictionary,
    check_data,
    check_ends,
    check_input,
    check_no_labels,
    until_the_end,
)
from keras_cluster_mask.training.layers import (
    all_layers,
    from_parts,
    frozen_parts,
    state_variables,
)
from keras_cluster_mask.training.micro_batches import (
    embed_in_micro_batches,
    rows_of_replica,
)
from keras_cluster_mask.training.tokens import check_tokenizer_of, remembered_tokenizer


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(keras.Model):
    """Trains an image encoder and a text encoder on image-text pairs.

    Each image of a batch is compared with every text; the encoders learn to place an
    image near its own text and far from the others. Compile it with an optimizer alone,
    the loss is built in. Batches are dictionaries
    `{"images": (B, H, W, C), "token_ids": (B, T)}` without labels. uint8 images are
    scaled and normalised on the device; others must be normalised. A further entry
    `"sample_weight"`, `(B,)` floats, weights what each pair contributes to the loss,
    which is still divided by the number of pairs, and to the accuracies; a pair of
    weight 0 still is a negative of the others.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(
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
            features; with a masking of its own, if it is to train on parts of the
            texts (`kcm.with_text_masking`). One of several inputs, such as
            `keras.Model(bert.inputs, bert.output["pooled_output"])` of a keras_hub
            `BertBackbone`, takes them from the batch by their names. Of those that a
            batch lacks, `"padding_mask"` is made: it hides ids of 0, and other zeros
            are refused. `"segment_ids"` are 0.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP).
        projection_dim: Integer. The width of the common space, which a matrix maps
            each kind of features into. `None` takes the features as they are; they
            must have the same width.
        micro_batch_size: Integer that divides the batch size. Trains on so many pairs
            at a time, at the memory of a batch of that size, and yet compares each
            pair with the whole batch: the gradients are those of the whole batch.
            Costs a second pass through the encoders without gradients. `None` takes
            the batch at once.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for
            sigmoid.
        initial_logit_bias: Float. Defaults to -10. For the sigmoid loss.
        max_logit_scale: Float. The scale of the logits, 1 / temperature, never
            exceeds it.
        duplicates: `"positive"` or `"negative"`. What an image and the text of another
            image are if both have the same text. It affects the sigmoid loss and the
            accuracies; the softmax loss is the same for texts with equal embeddings.
        gradient_checkpointing: Boolean. Whether the transformer blocks of both encoders
            keep only their input in training, and recompute their activations for the
            gradients. Costs about a third more time for much less memory; the results
            are the same. The blocks of keras_hub are known; for other encoders, pass a
            list of the names of the layers that are blocks.
        pixel_mean: Three floats, by channel. uint8 images are scaled to [0, 1] and
            normalised with this mean. Defaults to CLIP's. `None` passes images to the
            encoder unchanged.
        pixel_std: Three floats, by channel. Defaults to CLIP's.
        tokenizer_fingerprint: str, which identifies the tokenizer that the model was
            trained with. `None` until the first `fit` on an `image_text_dataset`. Later
            fits and evaluations refuse another tokenizer, unless the attribute of this
            name is set to `None`.
        head: A `ContrastiveHead` to use, such as another model's, instead of one made
            from the arguments above, which must be the same. Not saved: a loaded model
            has its own.
        dtype: The dtype policy of the projections. Encoders have their own.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Metrics in training: `loss`, `image_to_text_accuracy` and `text_to_image_accuracy`
    within the batch, `temperature`, and, with a masking of images, `mask_ratio`: the
    share of patches that had no influence. `compile` adds `gradient_norm` if asked.
    Evaluation has neither of the last two.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    # Classes for backbones, by the name of the backbone's class. Filled by them.
    for_backbone = {}

    def __init__(
        self,
        image_encoder,
        text_encoder,
        loss="softmax",
        projection_dim=None,
        micro_batch_size=None,
        initial_temperature=None,
        initial_logit_bias=None,
        max_logit_scale=100.0,
        duplicates="positive",
        gradient_checkpointing=False,
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        tokenizer_fingerprint=None,
        head=None,
        dtype=None,
        **kwargs,
    ):
        # Each part casts for itself. With a mixed policy of its own, the model would
        # have all weights cast that it passes to micro-batches; and a masking must see
        # pixels in full precision.
        super().__init__(dtype="float32", **kwargs)
        self.autocast = False
        _check_encoder("image_encoder", image_encoder)
        _check_encoder("text_encoder", text_encoder)
        text_input_names(text_encoder)
        _check_options(duplicates, micro_batch_size)
        check_statistics(pixel_mean, pixel_std)
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.micro_batch_size = micro_batch_size
        self.duplicates = duplicates
        self.gradient_checkpointing = gradient_checkpointing
        self.pixel_mean = None if pixel_mean is None else [*map(float, pixel_mean)]
        self.pixel_std = None if pixel_std is None else [*map(float, pixel_std)]
        self.tokenizer_fingerprint = tokenizer_fingerprint
        given = {
            "loss": loss,
            "projection_dim": projection_dim,
            "initial_temperature": initial_temperature,
            "initial_logit_bias": initial_logit_bias,
            "max_logit_scale": max_logit_scale,
        }
        self.head = head or ContrastiveHead(**given, dtype=dtype, name="head")
        _check_head(self.head, given)
        self.head.build_projections(_width(image_encoder), _width(text_encoder))

        self.normalize_pixels = partial(
            normalize_pixels,
            mean=pixel_mean,
            std=pixel_std,
            data_format=data_format_of(image_encoder),
        )
        self.maskings = _maskings(self)
        self.image_maskings = _maskings(image_encoder)
        _check_own_maskings(self.image_maskings, text_encoder)
        for masking in self.maskings:
            masking.join(self.normalize_pixels)
        self.accuracy_metrics = [
            keras.metrics.Mean(name="image_to_text_accuracy"),
            keras.metrics.Mean(name="text_to_image_accuracy"),
        ]
        self.temperature_metric = keras.metrics.Mean(name="temperature")
        if self.image_maskings:
            self.mask_ratio_metric = keras.metrics.Mean(name="mask_ratio")
        # Set by `compile`, and while `fit` and `evaluate` run.
        self.gradient_norm = None
        self.training_run = None
        self.is_evaluating = False
        # Nothing is left to build, unless an encoder learns its width when called.
        self.built = all(x.built for x in all_layers(self) if x is not self)
        if self.built:
            self._blocks()

    @classmethod
    def from_backbone(
        cls,
        backbone: keras.Model,
        masking: PatchMasking | None = None,
        text_masking: PatchMasking | None = None,
        padding_first: bool = True,
        **kwargs,
    ) -> "ContrastiveModel":
        """Makes a model from a keras_hub backbone of two towers.

        The model trains the backbone itself, its projections, temperature and bias
        included: after `fit`, `backbone.save_to_preset` saves what was learned.

        Args:
            backbone: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
                `SigLIPBackbone`, fresh or pre-trained. MetaCLIP 2's text tower pools
                the end token, so each text must have one. SigLIP's takes only texts of
                `max_sequence_length` tokens and pools the last one: pad to the full
                length with the end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            text_masking: A `PatchMasking` layer for texts, see
                `kcm.with_text_masking`, or `None` to train on whole texts.
            padding_first: Boolean. Whether `text_masking` leaves out padding before any
                word.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders and
                `projection_dim`. `loss` defaults to the backbone's own, and so do
                `pixel_mean` and `pixel_std`. `initial_temperature=None` keeps the
                temperature of the backbone; a fresh SigLIP, and a CLIP with the
                sigmoid loss, start at 0.1, with a bias of -10.

        Returns:
            A `ContrastiveModel` with the attributes `backbone`, `masking` and
            `text_masking`.

        Raises:
            ValueError: For another backbone.
        """
        known = ContrastiveModel.for_backbone
        names = [x.__name__ for x in type(backbone).__mro__ if x.__name__ in known]
        if not names:
            raise ValueError(
                "`backbone` must be a keras_hub backbone of "
                f"{sorted(known)}. Received: "
                f"backbone={backbone} of type {type(backbone).__name__}"
            )
        return known[names[0]](
            backbone,
            masking=masking,
            text_masking=text_masking,
            padding_first=padding_first,
            **kwargs,
        )

    from_clip = from_backbone
    from_siglip = from_backbone

    # === From inputs to embeddings ===

    def image_features(self, images, training=None):
        """`(batch, d)` image features in the common space, before normalisation."""
        features = call_encoder(self.image_encoder, images, training)
        return self.head.project_image(_check_features(self.image_encoder, features))

    def text_features(self, token_ids, training=None):
        """`(batch, d)` text features in the common space, before normalisation."""
        features = call_encoder(self.text_encoder, token_ids, training)
        return self.head.project_text(_check_features(self.text_encoder, features))

    def encode_image(self, images, training=None):
        """Embeds images.

        Args:
            images: `(batch, H, W, C)` tensor, uint8 or normalised floats.
            training: Python boolean. Parts of the images are left out if true.

        Returns:
            `(batch, d)` float32 tensor, L2-normalised.
        """
        if not is_traced(images):
            self.input_rules.check_images(images)
        return self.image_embeddings(images, training)

    def encode_text(self, token_ids, training=None):
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor, or a dictionary of such, if the text
                encoder has further inputs: `{"token_ids": ..., "padding_mask": ...}`.
            training: Python boolean. With a masking of texts, parts of them are left
                out if true.

        Returns:
            `(batch, d)` float32 tensor, L2-normalised.

        Raises:
            ValueError: For ids that the text encoder does not know, or a dictionary
                that it cannot be called on.
        """
        given = token_ids if isinstance(token_ids, dict) else {"token_ids": token_ids}
        if "token_ids" in given and not is_traced(given["token_ids"]):
            has_mask = "padding_mask" in given
            self.input_rules.check_ids(given["token_ids"], has_mask)
        return self.text_embeddings(token_ids, training)

    # Those that follow check no values, since data is checked before it is trained on.

    def image_embeddings(self, images, training=None):
        """As `encode_image`."""
        pixels = self.normalize_pixels(images)
        return l2_normalize(self.image_features(pixels, training))

    def text_embeddings(self, token_ids, training=None):
        """As `encode_text`."""
        inputs = text_inputs(self.text_encoder, token_ids)
        return l2_normalize(self.text_features(inputs, training))

    def embed(self, inputs, training=None):
        """Embeds a batch, or a micro-batch, of images and texts."""
        texts = {key: inputs[key] for key in self.text_input_names if key in inputs}
        with checkpointed(self._blocks() if training else []):
            return {
                "image_embeddings": self.image_embeddings(inputs["images"], training),
                "text_embeddings": self.text_embeddings(texts, training),
            }

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

    # === One step of training ===

    def train_step(self, *args):
        """One step of training, on every backend.

        Keras passes `(data)` on TensorFlow and torch and `(state, data)` on
        JAX; gradients and updates are Keras's own. Override `compute_loss` to
        train on another loss.
        """
        with wait_for(args):
            results = super().train_step(*args)
        if num_replicas() > 1:
            states = state_variables(self)
            floats = [v for v in states if keras.backend.is_float_dtype(v.dtype)]
            all_reduce_mean(floats)
        return results

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        check_no_labels(y=y)
        images, texts = y_pred["image_embeddings"], y_pred["text_embeddings"]
        if training and images.shape[0] == 1:
            raise ValueError(f"{LONELY} Received: a batch of 1")
        # Keras passes on its own argument only with labels, and of single batches.
        if sample_weight is None:
            sample_weight = x.get(SAMPLE_WEIGHT)
        if sample_weight is not None:
            if len(sample_weight.shape) != 1:
                raise ValueError(
                    "`sample_weight` must have shape (batch,). "
                    f"Received: sample_weight.shape={tuple(sample_weight.shape)}"
                )
            sample_weight = ops.cast(sample_weight, "float32")
        if self.duplicates == "positive":
            labels = caption_labels(x["token_ids"])
        else:
            labels = ops.arange(ops.shape(images)[0])
        weights, is_split = self.head.loss_weights, batch_is_split(training)
        losses, *hits = batch_loss(
            self.head.loss, weights, images, texts, labels, sample_weight, is_split
        )
        # A replica may have no rows in evaluation.
        rows = ops.maximum(ops.shape(losses)[0], 1)
        loss = ops.sum(losses) / ops.cast(rows, losses.dtype)
        for extra in self.losses:
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        if is_split:
            loss = local_loss(loss)
            *hits, sample_weight = map(metric_rows, (*hits, sample_weight))
        for metric, values in zip(self.accuracy_metrics, hits):
            metric.update_state(values, sample_weight)
        self.temperature_metric.update_state(1.0 / weights[0])
        if training:
            for masking in self.image_maskings:
                ratio = replica_mean(masking.last_mask_ratio)
                self.mask_ratio_metric.update_state(ratio)
            for masking in self.maskings:
                masking.advance()
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self.gradient_norm is not None and not self.is_evaluating:
            self.gradient_norm.update_metric()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self):
        logs = super().get_metrics_result()
        if self.is_evaluating:
            # Evaluation has no gradients, and masks nothing.
            for name in ("gradient_norm", "mask_ratio"):
                logs.pop(name, None)
        return logs

    def make_train_function(self, force=False):
        # The last moment before a step is compiled, at which values can be read.
        prepare_replicas(self)
        optimizers.use_global_gradients(self)
        for masking in self.maskings:
            masking.check_ready()
        return super().make_train_function(force)

    @property
    def metrics(self):
        own = [] if self.gradient_norm is None else [self.gradient_norm.metric]
        return super().metrics + own

    # === Compile, fit, evaluate, predict ===

    def compile(
        self,
        optimizer="rmsprop",
        *,
        learning_rate_multipliers=None,
        decay_vectors=False,
        log_gradient_norm=False,
        **kwargs,
    ):
        """Chooses the optimizer and which weights it treats how.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        # A pre-trained image tower is trained at a tenth of the rate.
        model.compile(
            keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0),
            learning_rate_multipliers={"image": 0.1},
            log_gradient_norm=True,
        )
        ```

        Args:
            optimizer: A Keras optimizer, or its name. Not a `Nadam` or
                `MultiOptimizer` if there are `learning_rate_multipliers`.
            learning_rate_multipliers: Dictionary of floats. Factors on the learning
                rate, and on decoupled weight decay, by tower: `"image"` and `"text"`,
                each with its projection. All other weights keep the rate. To freeze a
                tower, set `encoder.trainable = False` before compiling.
            decay_vectors: Boolean. Whether weight decay applies to biases and vectors
                too, such as the scales of norms, class tokens and the temperature. By
                default it applies to matrices alone, except for those that the
                optimizer excludes already.
            log_gradient_norm: Boolean. Whether `fit` reports `gradient_norm`: the L2
                norm of the gradients of all weights and of the whole batch before they
                are clipped, as the mean over the steps of an epoch. Steps that a
                `LossScaleOptimizer` skips do not count.
            **kwargs: Arguments of `keras.Model.compile`, without losses and metrics,
                which are built in. `auto_scale_loss` scales the loss if an encoder
                computes in float16.

        Raises:
            ValueError: For a loss or metrics, a multiplier of something else than a
                tower, or an optimizer that has already been built to decay vectors.
        """
        multipliers = optimizers.check_multipliers(
            learning_rate_multipliers or {}, self.towers
        )
        _check_no_losses(kwargs)
        optimizer = keras.optimizers.get(optimizer)
        if kwargs.get("auto_scale_loss", True):
            optimizer = optimizers.with_loss_scaling(optimizer, all_layers(self))
        super().compile(optimizer, **kwargs)
        self.optimizer_options = {
            "learning_rate_multipliers": multipliers,
            "decay_vectors": bool(decay_vectors),
            "log_gradient_norm": bool(log_gradient_norm),
        }
        self.gradient_norm = None
        if log_gradient_norm:
            self.gradient_norm = optimizers.GradientNorm(self.optimizer)
        if self.optimizer is not None:
            optimizers.configure(
                self.optimizer,
                self.trainable_variables,
                partial(self._factors, multipliers) if multipliers else None,
                decay_vectors,
            )

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
        resume_from: str | os.PathLike | None = None,
        **kwargs,
    ) -> keras.callbacks.History:
        """Trains the model: `keras.Model.fit` with one argument more.

        A run that was killed is continued by starting the same program again, if it
        saves checkpoints and resumes from their folder. On one machine and in float32
        it ends, bit for bit, at the weights of a run that was never interrupted. The
        rest of an interrupted epoch is a Keras `fit` of its own: callbacks are told
        that training begins and ends, and `CSVLogger` needs `append=True`. The returned
        history holds all epochs, those before the interruption included.

        Arrays are trained on in full batches: the pairs that fill no batch are left
        out of an epoch, after the shuffle, with a warning.

        An epoch of an `image_text_dataset` has as many steps as its samples fill
        batches, `len(dataset)`; the samples left over come first in the next epoch. A
        further `fit` continues where the last one ended.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        model.compile(optimizer="adam")
        batch = {
            "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
            "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
        }
        model.fit(
            batch,
            batch_size=4,
            resume_from="run",
            callbacks=[kcm.callbacks.Checkpoint("run")],
        )
        ```

        Args:
            resume_from: str or path. A folder of a `kcm.callbacks.Checkpoint`, which
                may be at an address such as `gs://`: training starts from its last
                good checkpoint, from the beginning if there is none, and says which.
                Or the path of one checkpoint, which must exist. Options of `compile`
                that differ from the checkpoint's win, with a warning.
            others: Those of `keras.Model.fit`. `steps_per_epoch` continues through an
                `image_text_dataset` over the ends of its epochs.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            FileNotFoundError: If `resume_from` is a checkpoint that does not exist.
            ValueError: If the checkpoint is of another model, masking, optimizer,
                tokenizer or data seed; the differences are listed. If the tokenizer of
                an `image_text_dataset` is not the one that the model was trained with,
                or lacks the special tokens that the text encoder needs.
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
        try:
            with remembered_tokenizer(self, x):
                return fit(self, super().fit, x, options, resume_from)
        finally:
            self.training_run = None

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        **kwargs,
    ):
        x = as_dictionary(x, y, sample_weight)
        check_ends(x, steps)
        check_tokenizer_of(self, x)
        options = dict(batch_size=batch_size, verbose=verbose, steps=steps, **kwargs)
        with until_the_end(), self._evaluation():
            return super().evaluate(check_data(x, self.input_rules), **options)

    def predict(self, x, batch_size=None, verbose="auto", steps=None, **kwargs):
        x = as_dictionary(x)
        check_ends(x, steps)
        check_tokenizer_of(self, x)
        options = dict(batch_size=batch_size, verbose=verbose, steps=steps, **kwargs)
        with until_the_end():
            return super().predict(check_data(x, self.input_rules), **options)

    def train_on_batch(
        self, x, y=None, sample_weight=None, class_weight=None, return_dict=False
    ):
        x = as_dictionary(x, y, sample_weight, class_weight)
        x = check_data(x, self.input_rules, training=True)
        return super().train_on_batch(x, return_dict=return_dict)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        x = check_data(as_dictionary(x, y, sample_weight), self.input_rules)
        with self._evaluation():
            return super().test_on_batch(x, return_dict=return_dict)

    # === Parts of the model ===

    @property
    def vocabulary_size(self):
        """The number of token ids the text encoder knows, or `None`."""
        return getattr(self.text_encoder, "vocabulary_size", None)

    @property
    def end_token_id(self):
        """The id that every text must hold since it is pooled there, or `None`."""
        return None

    @property
    def input_rules(self):
        """What images and token ids must be like, an `InputRules`."""
        texts = [name for name in self.text_input_names if name not in MADE]
        return InputRules(
            keys=("images", *texts),
            context_length=self.context_length,
            vocabulary_size=self.vocabulary_size,
            end_token_id=self.end_token_id,
            zeros_are_padding="padding_mask" in self.text_input_names,
            pixel_range=pixel_range(self.pixel_mean, self.pixel_std),
        )

    @property
    def text_input_names(self):
        """The entries of a batch that the text encoder takes."""
        return text_input_names(self.text_encoder)

    @property
    def pools_highest_id(self):
        """Whether the text encoder pools at the highest token id, as CLIP's does."""
        layers = all_layers(self.text_encoder)
        return any(type(layer).__name__ == "CLIPTextPooler" for layer in layers)

    @property
    def context_length(self):
        """The most tokens of a text that the text encoder takes, or `None`."""
        return context_length_of(self.text_encoder)

    @property
    def towers(self):
        """The layers that make image and text embeddings, as lists by tower."""
        towers = {
            "image": [self.image_encoder, self.head.image_projection],
            "text": [self.text_encoder, self.head.text_projection],
        }
        return {
            name: [x for x in tower if x is not None] for name, tower in towers.items()
        }

    @functools.cached_property
    def image_tower(self):
        """A `Tower` from images to embeddings: what `encode_image` computes."""
        # Nothing is masked at inference, so the file of a tower needs no masking.
        model = self
        if isinstance(self.image_encoder, MaskedEncoder):
            model = self.without_masking()
        return Tower.of(
            model.image_encoder,
            model.image_features,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            data_format=data_format_of(model.image_encoder),
            name="image_tower",
        )

    @functools.cached_property
    def text_tower(self):
        """A `Tower` from token ids to embeddings: what `encode_text` computes.

        Of a text encoder with several inputs, it takes a dictionary of them.
        """
        model = self
        if isinstance(self.text_encoder, MaskedTextEncoder):
            model = self.without_masking()
        return Tower.of(model.text_encoder, model.text_features, name="text_tower")

    def without_masking(self):
        """Makes a model of the same weights that trains on whole images and texts.

        For the last epochs: a model pre-trained on parts of images improves by some
        training on whole ones. Encoders, projections, temperature and bias are shared,
        so training one trains the other; only the optimizer is new.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))
        # model.compile(...), model.fit(...), and then:
        whole = model.without_masking()
        whole.compile(optimizer=keras.optimizers.AdamW(1e-5))
        ```

        Returns:
            A model of the same class, to be compiled.

        Raises:
            ValueError: If a masking was put into an encoder by other means than
                `kcm.with_masking` and `kcm.with_text_masking`.

        Reference:
            - [Scaling Language-Image Pre-training via Masking](
              https://arxiv.org/abs/2212.00794) for unmasked tuning.
        """
        masked = MaskedEncoder, MaskedTextEncoder
        encoders = self.image_encoder, self.text_encoder
        whole = type(self)(
            *(x.encoder if isinstance(x, masked) else x for x in encoders),
            projection_dim=self.head.projection_dim,
            head=self.head,
            **self._options(),
        )
        if whole.maskings:
            raise ValueError(
                "Encoders must have their maskings from `kcm.with_masking` and "
                "`kcm.with_text_masking`, which can remove them. Received: maskings "
                f"{[masking.name for masking in whole.maskings]} of another kind"
            )
        return whole

    @contextlib.contextmanager
    def _evaluation(self):
        self.is_evaluating = True
        try:
            yield
        finally:
            self.is_evaluating = False

    def _blocks(self):
        return find_blocks(self, self.gradient_checkpointing, BLOCKS)

    def _factors(self, multipliers):
        """The factors of weights other than 1, by the weights' ids."""
        return {
            id(variable): factor
            for name, factor in multipliers.items()
            for layer in self.towers[name]
            for variable in layer.weights
            if factor != 1
        }

    # === Saving ===

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, **self.optimizer_options} if config else config

    def compile_from_config(self, config):
        # Keras's own is for models that do not override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self):
        return {
            **self._options(),
            "projection_dim": self.head.projection_dim,
            "image_encoder": keras.saving.serialize_keras_object(self.image_encoder),
            "text_encoder": keras.saving.serialize_keras_object(self.text_encoder),
            "frozen": frozen_parts(self),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return from_parts(cls, config, custom_objects)

    def _options(self):
        """The constructor's arguments that models for backbones take too."""
        names = self.gradient_checkpointing
        return {
            "name": self.name,
            "loss": self.head.loss,
            "micro_batch_size": self.micro_batch_size,
            "initial_temperature": self.head.initial_temperature,
            "initial_logit_bias": self.head.initial_logit_bias,
            "max_logit_scale": self.head.max_logit_scale,
            "duplicates": self.duplicates,
            "gradient_checkpointing": names if isinstance(names, bool) else [*names],
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
            "dtype": self.head.dtype_policy.name,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }


def _maskings(layer):
    return [x for x in all_layers(layer) if isinstance(x, PatchMasking)]


def _check_own_maskings(image_maskings, text_encoder):
    for masking in _maskings(text_encoder):
        if any(masking is x for x in image_maskings):
            raise ValueError(
                "`text_encoder` must have a masking of its own, as each remembers its "
                f"noise and its mask ratio. Received: {masking.name} in both encoders"
            )


def _width(encoder):
    shape = getattr(getattr(encoder, "output", None), "shape", None)
    return None if shape is None else shape[-1]


def _check_encoder(name, encoder):
    if not isinstance(encoder, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a Keras model. "
            f"Received: {name}={encoder} of type {type(encoder).__name__}"
        )


def _check_features(encoder, features):
    if len(getattr(features, "shape", ())) != 2:
        raise ValueError(
            "An encoder must return features of shape (batch, d); add a pooling to one "
            f"that returns tokens. Received: {encoder.name} returned "
            f"{getattr(features, 'shape', type(features).__name__)}"
        )
    return features


def _check_head(head, given):
    for name, value in given.items():
        if getattr(head, name) != value:
            raise ValueError(
                f"`{name}` must be that of `head`, which defines it. Received: "
                f"{name}={value!r}, head.{name}={getattr(head, name)!r}"
            )


def _check_no_losses(options):
    for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
        if options.get(name) is not None:
            raise ValueError(
                f"`{name}` must not be given: the loss is the argument `loss` of the "
                "model, and the metrics are built in. "
                f"Received: {name}={options[name]!r}"
            )


def _check_options(duplicates, micro_batch_size):
    if duplicates not in ("positive", "negative"):
        raise ValueError(
            "`duplicates` must be 'positive' or 'negative'. "
            f"Received: duplicates={duplicates!r}"
        )
    if micro_batch_size is not None and not (
        isinstance(micro_batch_size, int) and micro_batch_size > 0
    ):
        raise ValueError(
            "`micro_batch_size` must be a positive integer or None. "
            f"Received: micro_batch_size={micro_batch_size!r}"
        )
