"""The model for contrastive training on image-text pairs."""

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution import gradients, replicas
from keras_cluster_mask.distribution.gradient_buckets import GradientBuckets
from keras_cluster_mask.distribution.start_values import keeping_weights
from keras_cluster_mask.losses import batch_loss, caption_labels
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.dual_encoder import DualEncoder
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.models.masked_encoder import MaskedEncoder
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.models.tower import Tower
from keras_cluster_mask.training import layers, micro_batches, optimizers
from keras_cluster_mask.training.finite_steps import FiniteSteps
from keras_cluster_mask.training.fitting import fit
from keras_cluster_mask.training.input_rules import LONELY
from keras_cluster_mask.training.inputs import (
    as_dictionary,
    check_input,
    check_no_labels,
    check_no_losses,
    evaluation_data,
    sample_weights,
    until_the_end,
)
from keras_cluster_mask.training.tokens import remembered_tokenizer
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(DualEncoder):
    """Trains an image encoder and a text encoder on image-text pairs.

    Each image of a batch is compared with every text; the encoders learn to place an
    image near its own text and far from the others. Compile the model with an optimizer
    only: the loss is built in. Batches are dictionaries
    `{"images": (B, H, W, C), "token_ids": (B, T)}` without labels. uint8 images are
    scaled and normalized on the device; float images must be normalized already. An
    optional entry `"sample_weight"`, `(B,)` floats, weights the loss and the accuracies
    of each pair. The loss is still divided by the number of pairs. A pair of weight 0
    remains a negative for the other pairs.

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
        image_encoder: A Keras model from images to `(batch, d)` features. To train on
            parts of the images, insert a masking with `kcm.with_masking`.
        text_encoder: A Keras model from `(batch, T)` token ids to `(batch, d)`
            features. A model with several inputs, such as
            `keras.Model(bert.inputs, bert.output["pooled_output"])` of a keras_hub
            `BertBackbone`, receives the entries of the batch with the same names. If
            the batch has no `"padding_mask"`, ids of 0 are hidden as padding; an id of
            0 before other ids raises an error. If it has no `"segment_ids"`, they are
            all 0.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP).
        projection_dim: Integer. The width of the shared embedding space. A linear
            projection maps the features of each encoder into it. `None` uses the
            features without a projection; they must have the same width.
        micro_batch_size: Integer that divides the batch size. Encodes this many pairs
            at a time, with the memory of a batch of that size, and computes the loss on
            the whole batch (gradient caching, as in GradCache). The gradients equal
            those of the whole batch. Costs a second forward pass through the encoders.
            `None` encodes the batch at once.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for
            sigmoid.
        initial_logit_bias: Float. Defaults to -10. For the sigmoid loss.
        max_logit_scale: Float. The scale of the logits, 1 / temperature, never
            exceeds it.
        duplicates: `"positive"` or `"negative"`. Whether pairs with equal texts are
            positives or negatives of one another. Affects the sigmoid loss and the
            accuracies. The softmax loss is the same for texts with equal embeddings.
        views: Integer. The number of masked views of each image in a step, each with
            its own mask. The patches are embedded once and the text is encoded once;
            the rest of the image encoder runs once per view. Loss and metrics are means
            over the views. Two views of half the patches cost about as much as the
            whole image (A-CLIP).
        gradient_checkpointing: Boolean. Whether the transformer blocks of both encoders
            store only their input in training, and recompute their activations in the
            backward pass. Costs about a third more time. The memory saved depends on
            the depth of the encoders and on the backend. The results are the same.
            keras_hub's blocks are recognized; for other encoders, pass a list of the
            names of the layers that are blocks.
        pixel_mean: Three floats, one per channel. uint8 images are scaled to [0, 1] and
            normalized with this mean. Defaults to CLIP's. `None` passes images to the
            encoder unchanged.
        pixel_std: Three floats, one per channel. Defaults to CLIP's.
        tokenizer_fingerprint: String that identifies the tokenizer that the model was
            trained with. `None` until the first `fit` on an `image_text_dataset`.
            Afterwards, `fit` and `evaluate` raise an error for another tokenizer,
            unless you set the attribute of this name to `None`.
        head: A `ContrastiveHead` to share, such as another model's. Its options must
            equal the arguments above. By default, a new head is made from them. Sharing
            is not saved: a loaded model has its own head.
        dtype: The dtype policy of the projections. Encoders have their own.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Metrics in training: `loss`, `image_to_text_accuracy` and `text_to_image_accuracy`
    within the batch, `temperature`, and, with a masking of images, `mask_ratio`: the
    fraction of patches that had no influence. `compile(log_gradient_norm=True)` adds
    `gradient_norm`. Evaluation reports neither `mask_ratio` nor `gradient_norm`.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
        - [Attentive Mask CLIP](https://arxiv.org/abs/2212.08653) for several views.
    """

    # Model classes by the name of the backbone's class. `backbones.py` fills it.
    for_backbone = {}

    def __init__(
        self,
        image_encoder: keras.Model,
        text_encoder: keras.Model,
        loss: str = "softmax",
        projection_dim: int | None = None,
        micro_batch_size: int | None = None,
        initial_temperature: float | None = None,
        initial_logit_bias: float | None = None,
        max_logit_scale: float = 100.0,
        duplicates: str = "positive",
        views: int = 1,
        gradient_checkpointing: bool | Sequence[str] = False,
        pixel_mean: Sequence[float] | None = CLIP_MEAN,
        pixel_std: Sequence[float] = CLIP_STD,
        tokenizer_fingerprint: str | None = None,
        head: ContrastiveHead | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        check_choice("duplicates", duplicates, ("positive", "negative"))
        options = {
            "loss": loss,
            "projection_dim": projection_dim,
            "initial_temperature": initial_temperature,
            "initial_logit_bias": initial_logit_bias,
            "max_logit_scale": max_logit_scale,
        }
        if head is None:
            head = ContrastiveHead(**options, dtype=dtype, name="head")
        head.check_options(options)
        super().__init__(
            image_encoder,
            text_encoder,
            head,
            views,
            gradient_checkpointing,
            pixel_mean,
            pixel_std,
            **kwargs,
        )
        self.micro_batch_size = check_integer(
            "micro_batch_size", micro_batch_size, or_none=True
        )
        self.duplicates = duplicates
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.accuracy_metrics = [
            keras.metrics.Mean(name="image_to_text_accuracy"),
            keras.metrics.Mean(name="text_to_image_accuracy"),
        ]
        self.temperature_metric = keras.metrics.Mean(name="temperature")
        if self.maskings:
            self.mask_ratio_metric = keras.metrics.Mean(name="mask_ratio")
        self.finite_steps = FiniteSteps()
        self.gradient_buckets = GradientBuckets()
        # Set by `compile`, and while `fit` and `evaluate` run.
        self.gradient_norm = None
        self.training_run = None
        self.is_evaluating = False

    @classmethod
    def from_backbone(
        cls,
        backbone: keras.Model,
        masking: PatchMasking | None = None,
        **kwargs: Any,
    ) -> "ContrastiveModel":
        """Makes a model from a two-tower keras_hub backbone.

        The model trains the backbone itself, including its projections, temperature and
        bias. After `fit`, `backbone.save_to_preset` saves the trained weights.

        Args:
            backbone: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
                `SigLIPBackbone`, fresh or pre-trained. MetaCLIP 2's text tower pools
                the end token, so each text must have one. SigLIP's takes only texts of
                `max_sequence_length` tokens and pools the last one: pad to the full
                length with the end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders and
                `projection_dim`. `loss` defaults to the backbone's own, and so do
                `pixel_mean` and `pixel_std`. `initial_temperature=None` keeps the
                temperature of the backbone; a fresh SigLIP, and a CLIP with the
                sigmoid loss, start at 0.1, with a bias of -10.

        Returns:
            A `ContrastiveModel` with the attributes `backbone` and `masking`: a
            `kcm.models.CLIPContrastiveModel`, `MetaCLIP2ContrastiveModel` or
            `SigLIPContrastiveModel`. Called on a subclass of one of these, it returns a
            model of that subclass.

        Raises:
            ValueError: If the backbone is not supported, or does not match the class
                that the method is called on.
        """
        known = ContrastiveModel.for_backbone
        names = [x.__name__ for x in type(backbone).__mro__ if x.__name__ in known]
        if not names:
            raise ValueError(
                "`backbone` must be a keras_hub backbone of "
                f"{sorted(known)}. Received: "
                f"backbone={backbone} of type {type(backbone).__name__}"
            )
        kind = known[names[0]]
        if issubclass(cls, kind):
            kind = cls
        elif cls is not ContrastiveModel:
            raise ValueError(
                f"`from_backbone` of a subclass must be that of a `{kind.__name__}` "
                f"for this backbone: derive `{cls.__name__}` from it. Received: "
                f"backbone={backbone} of type {type(backbone).__name__}"
            )
        return kind(backbone, masking=masking, **kwargs)

    # === One step of training ===

    def call(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> dict[str, Tensor]:
        check_input(inputs)
        if not training:
            return self.embed(inputs, training)
        if not self.micro_batch_size:
            with micro_batches.rows_of_replica(inputs):
                return self.embed(inputs, training)
        embeddings, extra_losses = micro_batches.embed_in_micro_batches(
            self, inputs, self.micro_batch_size
        )
        self.add_loss(extra_losses)
        return embeddings

    def train_step(self, *args: Any) -> Any:
        """Runs one training step, on every backend.

        Keras passes `(data)` on TensorFlow and torch and `(state, data)` on JAX, and
        computes the gradients and updates. Override `compute_loss` to train on another
        loss.
        """
        with gradients.around_step(self, args):
            results = super().train_step(*args)
        if replicas.num_replicas() > 1:
            replicas.all_reduce_mean(layers.averaged_variables(self))
        return results

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Tensor | None = None,
        training: bool = True,
    ) -> Tensor:
        """Computes the loss of a batch, and updates the metrics and the maskings.

        To train on another loss, override this method and call
        `super().compute_loss(...)` in it.

        Args:
            x: The batch, a dictionary.
            y: `None`.
            y_pred: The output of `call`: a dictionary with `"image_embeddings"`,
                `(batch, d)` or `(batch, views, d)`, and `"text_embeddings"`,
                `(batch, d)`, L2-normalized.
            sample_weight: `(batch,)` float tensor. Defaults to the batch's entry of
                that name.
            training: Boolean. Whether this is a training step.

        Returns:
            A scalar, the mean over the pairs.
        """
        check_no_labels(y=y)
        images, texts = y_pred["image_embeddings"], y_pred["text_embeddings"]
        if training and images.shape[0] == 1:
            raise ValueError(f"{LONELY} Received: a batch of 1")
        sample_weight = sample_weights(x, sample_weight)
        if self.duplicates == "positive":
            labels = caption_labels(x["token_ids"])
        else:
            labels = ops.arange(ops.shape(images)[0])
        weights, is_split = self.head.loss_weights, replicas.batch_is_split(training)
        views = [images] if len(images.shape) == 2 else ops.unstack(images, axis=1)
        # For each view, the contributions of the pairs to the loss and to the
        # accuracies.
        by_view = [
            batch_loss(
                self.head.loss, weights, view, texts, labels, sample_weight, is_split
            )
            for view in views
        ]
        losses, *hits = (sum(values) / len(views) for values in zip(*by_view))
        # A replica may have no rows in evaluation.
        rows = ops.maximum(ops.shape(losses)[0], 1)
        loss = ops.sum(losses) / ops.cast(rows, losses.dtype)
        for extra in self.losses:
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        if is_split:
            loss = replicas.local_loss(loss)
            *hits, sample_weight = map(replicas.metric_rows, (*hits, sample_weight))
        for metric, values in zip(self.accuracy_metrics, hits):
            metric.update_state(values, sample_weight)
        self.temperature_metric.update_state(1.0 / weights[0])
        if training:
            for masking in self.maskings:
                ratio = replicas.replica_mean(masking.last_mask_ratio)
                self.mask_ratio_metric.update_state(ratio)
                masking.advance()
        return loss

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Tensor | None = None
    ) -> dict[str, Any]:
        if not self.is_evaluating:
            # This is the end of a training step on every backend.
            (loss,) = (each for each in self.metrics if each.name == "loss")
            self.finite_steps.update_state(loss.result())
            if self.gradient_norm is not None:
                self.gradient_norm.update_metric()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def make_train_function(self, force: bool = False) -> Any:
        # Values can be read here for the last time before the step is compiled.
        gradients.prepare_replicas(self)
        optimizers.use_global_gradients(self)
        if self.built and self.optimizer and not self.optimizer.built:
            # TensorFlow cannot create the optimizer's variables in a step that XLA
            # compiles.
            self.optimizer.build(self.trainable_variables)
        for masking in self.maskings:
            masking.check_ready()
        return super().make_train_function(force)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        metrics = [x for x in super().metrics if x is not self.finite_steps]
        if self.is_evaluating:
            # Evaluation computes no gradients and masks no patches.
            return [x for x in metrics if x.name != "mask_ratio"]
        norm = self.gradient_norm
        # In the order of the logs. `finite_steps` is not logged.
        return [*metrics, *([] if norm is None else [norm.metric]), self.finite_steps]

    # === Compile, fit, evaluate, predict ===

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        *,
        decay_vectors: bool = False,
        log_gradient_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configures the optimizer, its weight decay, and the gradient norm metric.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        model.compile(
            keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0),
            log_gradient_norm=True,
        )
        ```

        Args:
            optimizer: A Keras optimizer, or its name. `kcm.tower_optimizer` makes one
                with a learning rate for each tower. To freeze a tower, set
                `encoder.trainable = False` before compiling. On torch, `Adam` and
                `AdamW` use torch's fused kernel, and `global_clipnorm` clips gradients
                in place.
            decay_vectors: Boolean. Whether weight decay also applies to biases and
                other vectors, such as the scales of normalization layers, class tokens
                and the temperature. By default it applies only to matrices, except
                those that the optimizer already excludes.
            log_gradient_norm: Boolean. Whether `fit` reports `gradient_norm`: the L2
                norm of the gradients of all weights for the whole batch, before
                clipping, averaged over the steps of an epoch. Steps that a
                `LossScaleOptimizer` skips do not count.
            **kwargs: Arguments of `keras.Model.compile`, without losses and metrics,
                which are built in. `auto_scale_loss` scales the loss if an encoder
                computes in float16.

        Raises:
            ValueError: If a loss or metrics are passed, or if the optimizer has already
                been built to decay vectors.
        """
        check_no_losses(kwargs)
        optimizer = keras.optimizers.get(optimizer)
        if kwargs.get("auto_scale_loss", True):
            optimizer = optimizers.with_loss_scaling(optimizer, layers.all_layers(self))
        super().compile(optimizer, **kwargs)
        self.optimizer_options = {
            "decay_vectors": bool(decay_vectors),
            "log_gradient_norm": bool(log_gradient_norm),
        }
        optimizers.configure(self)

    def fit(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        *args: Any,
        resume_from: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the model, like `keras.Model.fit` with one additional argument.

        To resume a killed run, start the same program again. It must save checkpoints
        and pass their folder as `resume_from`. Training resumes with the epoch after
        the last checkpoint. Pass `steps_per_epoch` for shorter epochs, so that less
        training can be lost. On one machine and in float32, the final weights are
        bit-identical to those of an uninterrupted run. If you use `CSVLogger`, pass it
        `append=True`. The returned history holds all epochs, including those before the
        interruption.

        Training on arrays uses only full batches. The remaining pairs, after shuffling,
        are dropped from the epoch with a warning.

        An epoch of an `image_text_dataset` has `dataset.steps_per_epoch` steps, the
        number of full batches. The remaining samples are carried over to the next
        epoch. Another call of `fit`, and each epoch of `steps_per_epoch` steps,
        continues where the last one ended.

        Arguments other than `resume_from` are those of `keras.Model.fit`, in its order.

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
            resume_from: str or path. The folder of a `kcm.callbacks.Checkpoint`, local
                or a URL such as `gs://bucket/run`. Training starts from the last good
                checkpoint, or from the beginning if there is none, and prints which. It
                can also be the path of one checkpoint, which must exist. The options of
                `compile` may differ from those of the saved run; the new ones are used.
                A learning rate that a callback changed is restored, unless you compile
                with another rate than the saved run started with.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            FileNotFoundError: If `resume_from` is a checkpoint that does not exist.
            ValueError: If the checkpoint is of another model, masking, optimizer,
                tokenizer or data seed; the differences are listed. If the tokenizer of
                an `image_text_dataset` is not the one that the model was trained with,
                or lacks the special tokens that the text encoder needs.
        """
        args = (x, y, batch_size, epochs, *args)
        try:
            with remembered_tokenizer(self, x):
                return fit(self, super().fit, resume_from, *args, **kwargs)
        finally:
            self.training_run = None

    def evaluate(
        self,
        x: Any = None,
        y: None = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        **kwargs: Any,
    ) -> Any:
        x = evaluation_data(self, as_dictionary(x, y, sample_weight), steps)
        with until_the_end(), keeping_weights(self), self._evaluation():
            return super().evaluate(x, None, batch_size, verbose, None, steps, **kwargs)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        **kwargs: Any,
    ) -> dict[str, np.ndarray]:
        x = evaluation_data(self, as_dictionary(x), steps)
        with until_the_end(), keeping_weights(self):
            return super().predict(x, batch_size, verbose, steps, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self):
        self.is_evaluating = True
        try:
            yield
        finally:
            self.is_evaluating = False

    # === Other models that share the weights ===

    @functools.cached_property
    def image_tower(self) -> Tower:
        """A `Tower` that embeds images, as `encode_image` does."""
        # Nothing is masked at inference, so a saved tower needs no masking.
        is_masked = isinstance(self.image_encoder, MaskedEncoder)
        return Tower.of_images(self._with_whole_encoder() if is_masked else self)

    @functools.cached_property
    def text_tower(self) -> Tower:
        """A `Tower` that embeds token ids, as `encode_text` does.

        If the text encoder has several inputs, the tower takes a dictionary of them.
        """
        return Tower.of_texts(self)

    def without_masking(self) -> Self:
        """Makes a model with the same weights that trains on whole images.

        Use it for the last epochs: a model pre-trained on parts of images improves with
        some training on whole images. The models share encoders, projections,
        temperature and bias, so training one trains the other. Only the optimizer is
        new.

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
            ValueError: If the image encoder has a masking that `kcm.with_masking` did
                not insert.

        Reference:
            - [Scaling Language-Image Pre-training via Masking](
              https://arxiv.org/abs/2212.00794) for unmasked tuning.
        """
        whole = self._with_whole_encoder()
        if whole.maskings:
            raise ValueError(
                "`image_encoder` must have its masking from `kcm.with_masking`, which "
                "can remove it. Received: maskings "
                f"{[masking.name for masking in whole.maskings]} of another kind"
            )
        return whole

    def _with_whole_encoder(self):
        """Makes the model of `without_masking`, without checking for other maskings."""
        encoder = self.image_encoder
        if isinstance(encoder, MaskedEncoder):
            encoder = encoder.encoder
        options = {**self._options(), "views": 1}
        return type(self)(encoder, self.text_encoder, head=self.head, **options)

    # === Saving ===

    def get_compile_config(self) -> dict[str, Any] | None:
        config = super().get_compile_config()
        return {**config, **self.optimizer_options} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras's own method does not support models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        return {
            **self._options(),
            "image_encoder": keras.saving.serialize_keras_object(self.image_encoder),
            "text_encoder": keras.saving.serialize_keras_object(self.text_encoder),
            "frozen": layers.frozen_parts(self),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        return layers.from_parts(cls, config, custom_objects)

    def _options(self):
        """Returns the constructor arguments that backbone models also take."""
        names = self.gradient_checkpointing
        # Omitted for one view, because checkpoints of such models do not contain it.
        views = {"views": self.views} if self.views > 1 else {}
        return {
            "name": self.name,
            **self.head.options,
            **views,
            "micro_batch_size": self.micro_batch_size,
            "duplicates": self.duplicates,
            "gradient_checkpointing": names if isinstance(names, bool) else [*names],
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
            "dtype": self.head.dtype_policy.name,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }
