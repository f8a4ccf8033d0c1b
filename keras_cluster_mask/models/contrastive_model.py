"""The model for contrastive training on image-text pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution import replicas
from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.encoders.pixels import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.pooled import pretrained_towers
from keras_cluster_mask.encoders.surgery import kind_for
from keras_cluster_mask.losses import batch_loss, caption_labels, row_labels
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.selection import part_of_batch
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.models.trainer import ContrastiveTrainer
from keras_cluster_mask.training import micro_batches
from keras_cluster_mask.training.input_rules import (
    KEYS,
    LONELY,
    NO_LABELS,
    as_weights,
    check_unused,
)
from keras_cluster_mask.training.step_metrics import DIRECTIONS, StepMean
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(ContrastiveTrainer):
    """Trains an image encoder and a text encoder on image-text pairs.

    Each image of a batch is compared with every text; the encoders learn to place an
    image near its own text and far from the others. The loss is built in: compile the
    model with an optimizer only. Batches are dictionaries
    `{"images": (B, H, W, C), "token_ids": (B, T)}` without labels. uint8 images are
    normalized on the device; float images must be normalized already. An optional
    `"sample_weight"`, `(B,)` floats, weights the loss and the accuracies of each pair.
    The loss is divided by the number of pairs. Pairs of weight 0 remain negatives.

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
            `BertBackbone`, receives the entries of the batch with the same names. A
            missing `"padding_mask"` hides ids of 0, which may only be at the end of a
            text. Missing `"segment_ids"` are all 0.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP).
        projection_dim: Integer. The width of the shared embedding space. A linear
            projection maps the features of each encoder into it. `None` uses the
            features without a projection; they must have the same width.
        micro_batch_size: Integer that divides the batch size. Encodes this many pairs
            at a time, with the memory of a batch of that size. The loss and its
            gradients are those of the whole batch (gradient caching, as in GradCache).
            Costs a second forward pass. `None` encodes the batch at once.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for sigmoid.
        initial_logit_bias: Float. Defaults to -10. For the sigmoid loss.
        max_logit_scale: Float. The scale of the logits, 1 / temperature, never exceeds
            it. A pre-trained backbone with a higher scale keeps that.
        projection: `"linear"`, or `"mlp"` for projections with one hidden layer, GELU
            and dropout, of features that `fit` on `TowerFeatures` standardizes.
        duplicates: `"positive"` or `"negative"`. Whether pairs with equal texts are
            positives or negatives of one another. Affects the sigmoid loss and the
            accuracies. The softmax loss is the same for texts with equal embeddings.
        views: Integer. The number of views of each image in a step, each with its own
            mask. Patches are embedded once, and the rest of the image encoder runs once
            per view. Loss and metrics are means over the views. Two views of half the
            patches cost about as much as the whole image (A-CLIP).
        pixel_mean: Three floats, one per channel. uint8 images are scaled to [0, 1] and
            normalized with this mean. Defaults to CLIP's. `None` passes images to the
            encoder unchanged.
        pixel_std: Three floats, one per channel. Defaults to CLIP's.
        tokenizer_fingerprint: String that identifies the tokenizer that the model was
            trained with. The first `fit` on an `image_text_dataset` sets it. Then `fit`
            and `evaluate` raise an error for another tokenizer, unless you set the
            attribute of this name to `None`.
        head: A `ContrastiveHead` to share, such as another model's, with the options
            above. By default, a new head is made from them. Sharing is not saved: a
            loaded model has its own head. A model of a backbone shares only with
            another of the same backbone.
        dtype: The dtype policy of the projections. Encoders have their own.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Metrics: `loss`, `image_to_text_accuracy` and `text_to_image_accuracy` within the
    batch, and `temperature`; in training also `mask_ratio`, the fraction of patches
    that had no influence, and, after `compile(log_gradient_norm=True)`,
    `gradient_norm`.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
        - [Attentive Mask CLIP](https://arxiv.org/abs/2212.08653) for several views.
    """

    parts = ("image_encoder", "text_encoder")

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
        projection: str = "linear",
        duplicates: str = "positive",
        views: int = 1,
        pixel_mean: Sequence[float] | None = CLIP_MEAN,
        pixel_std: Sequence[float] = CLIP_STD,
        tokenizer_fingerprint: str | None = None,
        head: ContrastiveHead | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        check_choice("duplicates", duplicates, ("positive", "negative"))

        # === Layers ===
        options = {
            "loss": loss,
            "projection_dim": projection_dim,
            "initial_temperature": initial_temperature,
            "initial_logit_bias": initial_logit_bias,
            "max_logit_scale": max_logit_scale,
            "projection": projection,
        }
        if head is None:
            head = ContrastiveHead(**options, dtype=dtype, name="head")
        head.check_options(options)
        super().__init__(
            image_encoder,
            text_encoder,
            head,
            views=views,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            **kwargs,
        )

        # === Config ===
        self.micro_batch_size = check_integer(
            "micro_batch_size", micro_batch_size, or_none=True
        )
        self.duplicates = duplicates
        self.tokenizer_fingerprint = tokenizer_fingerprint

        # === Metrics ===
        self.accuracy_metrics = [StepMean(name=f"{x}_accuracy") for x in DIRECTIONS]
        self.temperature_metric = StepMean(name="temperature")
        if self.maskings:
            self.mask_ratio_metric = StepMean(name="mask_ratio")

    @classmethod
    def from_backbone(
        cls, backbone: keras.Model, masking: PatchMasking | None = None, **kwargs: Any
    ) -> "ContrastiveModel":
        """Makes a model from a two-tower keras_hub backbone.

        The model trains the backbone itself, including its projections, temperature and
        bias. After `fit`, `model.save_to_preset(folder, tokenizer)` saves the trained
        backbone and the tokenizer for keras_hub.

        Args:
            backbone: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
                `SigLIPBackbone`, fresh or pre-trained. MetaCLIP 2's text tower pools
                the end token, so each text must have one. SigLIP's takes only texts of
                `max_sequence_length` tokens and pools the last one: pad to the full
                length with the end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders and
                `projection_dim`. `loss`, `pixel_mean` and `pixel_std` default to the
                backbone's own, and `max_logit_scale` to 1000 for SigLIP. The
                temperature is that of the backbone unless given; a fresh SigLIP, and a
                CLIP with the sigmoid loss, start at 0.1, with a bias of -10.

        Returns:
            A `ContrastiveModel` with the attribute `backbone`: a
            `kcm.models.CLIPContrastiveModel`, `MetaCLIP2ContrastiveModel` or
            `SigLIPContrastiveModel`. Called on a subclass of one of these, it returns a
            model of that subclass.

        Raises:
            ValueError: If the backbone is not supported, or does not match the class
                that the method is called on.
        """
        return kind_for(cls, backbone)(backbone, masking=masking, **kwargs)

    @classmethod
    def from_preset(
        cls, preset: str, masking: PatchMasking | None = None, **kwargs: Any
    ) -> "ContrastiveModel":
        """Makes a model from a keras_hub preset of a two-tower backbone.

        Args:
            preset: The name of a preset, such as `"clip_vit_base_patch16"`, which
                keras_hub downloads, or a folder that `save_to_preset` wrote.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            **kwargs: As for `from_backbone`; and `dtype`, that of the backbone.
        """
        make = import_keras_hub().models.Backbone.from_preset
        backbone = make(str(preset), dtype=kwargs.pop("dtype", None))
        return cls.from_backbone(backbone, masking, **kwargs)

    @classmethod
    def from_encoders(
        cls,
        image_backbone: keras.Model,
        text_backbone: keras.Model,
        projection_dim: int = 512,
        masking: PatchMasking | None = None,
        head: str = "linear",
        pooling: tuple[str | None, str | None] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from two encoders that were pre-trained apart.

        Set `trainable = False` on both to train only the projections.

        Args:
            image_backbone: A keras_hub `DINOV2Backbone`, `DINOV3Backbone`,
                `ViTBackbone` or `DeiTBackbone`.
            text_backbone: A keras_hub `BertBackbone`, `DistilBertBackbone`,
                `RobertaBackbone` or `XLMRobertaBackbone`, or a `TextEmbedder` of one.
            projection_dim: Integer. The width of the shared embedding space.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            head: `"linear"` or `"mlp"`, see `projection` of `ContrastiveModel`.
            pooling: Two strings, for images and for texts: `"class"`, `"mean"`, or
                `"class_and_mean"`. `None` is that of the family: the class token and
                the mean of the patches for DINO, the class token for ViT and DeiT, the
                mean of all tokens but padding for texts. A `TextEmbedder` has its own.
            **kwargs: Arguments of `ContrastiveModel`. `pixel_mean` and `pixel_std`
                default to those of the family of `image_backbone`.

        Reference:
            - [LiT: Zero-Shot Transfer with Locked-image text Tuning](
              https://arxiv.org/abs/2111.07991)
        """
        towers = pretrained_towers(
            image_backbone, text_backbone, masking=masking, pooling=pooling
        )
        options = {**towers, **kwargs}
        return cls(projection_dim=projection_dim, projection=head, **options)

    # === One step of training ===

    def call(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> dict[str, Tensor]:
        # `fit`, `evaluate` and `predict` check their data before the model sees it.
        names = inputs.keys() if isinstance(inputs, dict) else ()
        is_features = "image_features" in names
        if not (is_features or {*KEYS} <= {*names}):
            self.input_rules.check_keys(inputs)
        if training and self.micro_batch_size and not is_features:
            embeddings, extra_losses = micro_batches.embed_in_micro_batches(
                self, inputs, self.micro_batch_size
            )
            self.add_loss(extra_losses)
        elif training and replicas.num_replicas() > 1:
            # A replica's rows get the same masks as in the global batch.
            rows = inputs["token_ids"].shape[0] * replicas.num_replicas()
            with part_of_batch(rows, replicas.local_rows):
                embeddings = self.embed(inputs, training)
        else:
            embeddings = self.embed(inputs, training)
        if training and self._phase.is_train_step:
            # Not in `compute_loss`, which may be overridden.
            for masking in self.maskings:
                masking.advance()
        return embeddings

    def embed(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> dict[str, Tensor]:
        """Embeds a batch, or a micro-batch, of images and texts, or of features."""
        images, texts, views = self.towers.image, self.towers.text, self.views
        if "image_features" in inputs:
            return {
                "image_embeddings": images.project(inputs["image_features"], training),
                "text_embeddings": texts.project(inputs["text_features"], training),
            }
        given = {name: inputs[name] for name in texts.input_names if name in inputs}
        return {
            "image_embeddings": images.embed(inputs["images"], training, views),
            "text_embeddings": texts.embed(given, training),
        }

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Tensor | None = None,
        training: bool = True,
    ) -> Tensor:
        """Computes the loss of a batch, and updates the metrics.

        To train on another loss, override this method. If it does not call
        `super().compute_loss(...)`, the logs show only the loss and the metrics that it
        updates. In a training loop of your own, a call is a step of the maskings.

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
        if y is not None:
            check_unused(NO_LABELS, y=y)
        images, texts = y_pred["image_embeddings"], y_pred["text_embeddings"]
        if training and images.shape[0] == 1:
            raise ValueError(f"{LONELY} Received: a batch of 1")
        if sample_weight is None:
            # Keras passes its own argument only for a single batch.
            sample_weight = x.get("sample_weight")
        if sample_weight is not None:
            sample_weight = as_weights(sample_weight)
        is_positive = self.duplicates == "positive"
        labels = (caption_labels if is_positive else row_labels)(x["token_ids"])
        weights = [self.head.scale]
        if self.head.logit_bias is not None:
            weights.append(self.head.logit_bias)
        is_split = replicas.batch_is_split(training)
        views = [images] if len(images.shape) == 2 else ops.unstack(images, axis=1)
        by_view = [
            batch_loss(
                loss=self.head.loss,
                weights=weights,
                images=view,
                texts=texts,
                labels=labels,
                sample_weight=sample_weight,
                is_split=is_split,
            )
            for view in views
        ]
        losses, *hits = (sum(values) / len(views) for values in zip(*by_view))
        # A replica may have no rows in evaluation.
        rows = ops.maximum(ops.shape(losses)[0], 1)
        loss = ops.sum(losses) / ops.cast(rows, losses.dtype)
        for extra in self.losses:
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        if self._is_evaluating:
            loss, sample_weight = self.without_small_batches(
                loss, losses, sample_weight, is_split
            )
        if is_split:
            loss = replicas.local_loss(loss)
            *hits, sample_weight = map(replicas.metric_rows, (*hits, sample_weight))
        for metric, values in zip(self.accuracy_metrics, hits):
            metric.update_state(values, sample_weight)
        self.temperature_metric.update_state(1.0 / weights[0])
        if training:
            self.update_mask_ratio(is_split)
        return loss

    # === Saving ===

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self.head.options,
            "micro_batch_size": self.micro_batch_size,
            "duplicates": self.duplicates,
            "views": self.views,
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
            "dtype": self.head.dtype_policy.name,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }
