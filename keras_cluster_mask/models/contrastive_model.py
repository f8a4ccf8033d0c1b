"""The model for contrastive training on image-text pairs."""

import functools
import os
from collections.abc import Mapping
from typing import Any, Self

import keras
from keras import ops

from keras_cluster_mask.distribution import gradients, replicas
from keras_cluster_mask.distribution.backends import import_keras_hub, preset_of
from keras_cluster_mask.encoders.pooled import pretrained_towers
from keras_cluster_mask.encoders.presets import image_encoder_of, text_encoder_of
from keras_cluster_mask.losses import (
    batch_loss,
    caption_labels,
    row_labels,
    without_padding,
)
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.backbones import parts_of_backbone
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.models.trainer import Trainer
from keras_cluster_mask.training.input_rules import (
    KEYS,
    LONELY,
    NO_LABELS,
    as_weights,
    check_unused,
)
from keras_cluster_mask.training.layers import from_parts
from keras_cluster_mask.training.micro_batches import embed_in_micro_batches
from keras_cluster_mask.training.model_tokenizer import load_from_preset
from keras_cluster_mask.types import Tensor, Tokenizer


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(Trainer):
    """Trains an image encoder and a text encoder on image-text pairs.

    Each image of a batch is compared with every text; the encoders learn to place an
    image near its own text and far from the others. The loss is built in: compile the
    model with an optimizer only. Batches are dictionaries
    `{"images": (B, H, W, C), "token_ids": (B, T)}` without labels. uint8 images are
    normalized on the device; float images must be normalized already. An optional
    `"sample_weight"`, `(B,)` floats, weights the loss and the accuracy of each pair.
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
            parts of the images, insert a masking with `kcm.with_masking`. Or an
            `ImageTower`, with a `TextTower` as `text_encoder`, to share the towers of
            another model or to use projections of your own.
        text_encoder: A Keras model from `(batch, T)` token ids to `(batch, d)`
            features. A model with several inputs, such as
            `keras.Model(bert.inputs, bert.output["pooled_output"])` of a keras_hub
            `BertBackbone`, receives the entries of the batch with the same names.
            Without a `"padding_mask"`, ids of 0 are hidden, and may only be at the end
            of a text. Missing `"segment_ids"` are all 0.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP). Defaults to the loss of
            `head`, or to `"softmax"`.
        projection_dim: Integer. The width of the shared embedding space. A projection
            maps the features of each encoder into it. `None` uses the features without
            a projection; both must have the same width.
        head: `"linear"` for linear projections, or `"mlp"` for projections with one
            hidden layer of twice the width, GELU and dropout of 0.3, of features that
            `fit` on `TowerFeatures` standardizes. A `.keras` file does not hold the
            random state of this dropout; a checkpoint does. Or a
            `kcm.models.ContrastiveHead`, with linear projections, to set the initial
            temperature, the bias and the limit of the scale, or to share the head of
            another model. Sharing is not saved: a loaded model has its own towers and
            head.
        micro_batch_size: Integer that divides the batch size. Encodes this many pairs
            at a time, with the memory of a batch of this size. The loss and gradients
            are the same as for the whole batch (gradient caching, as in GradCache),
            except that batch normalization uses the statistics of each micro-batch.
            This costs a second forward pass. `None` encodes the batch at once.
        duplicates: `"positive"` or `"negative"`. Whether pairs with equal texts are
            positives or negatives of one another. Affects the sigmoid loss and the
            accuracy. The softmax loss is the same for texts with equal embeddings.
        pixel_mean: Three floats, one per channel. uint8 images are scaled to [0, 1] and
            normalized with this mean. Defaults to CLIP's. `None` passes images to the
            encoder unchanged.
        pixel_std: Three floats, one per channel. Defaults to CLIP's.
        resize: `"crop"` or `"squash"`. How images of another size are fitted to the
            encoder: their center is cropped (CLIP), or the whole image is squashed
            (SigLIP).
        tokenizer: The tokenizer of the text encoder, of any kind that
            `kcm.data.image_text_dataset` takes. If `None`, the first `fit` on an
            `image_text_dataset` sets it. `save` and `save_to_preset` save a
            `CLIPTokenizer`, a Keras layer such as a keras_hub preprocessor, and a
            Hugging Face tokenizer. For any other callable they warn, and the loaded
            model has no tokenizer.
        dtype: The dtype policy of new projections. Encoders keep their own policies.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Attributes:
        image_encoder: The Keras model from images to features, with its masking.
        text_encoder: The Keras model from token ids to features.
        image_tower: The `ImageTower` from images to embeddings, which has the encoder
            and a projection. It predicts and is exported on whole images.
        text_tower: The `TextTower` from token ids to embeddings. If the text encoder
            has several inputs, the tower takes a dictionary of them.
        tokenizer: The tokenizer of the text encoder, or `None` if it is not known.
            `fit`, `evaluate`, `predict` and the functions for evaluation refuse a
            tokenizer of another kind, vocabulary or settings, and another function. To
            replace the tokenizer, assign another one, or `None`.
        head: The `ContrastiveHead`.
        maskings: List of the `PatchMasking` layers in the image encoder.
        masking: The first of these layers, or `None`.
        backbone: The keras_hub backbone of `from_backbone`, or `None`.

    All attributes except `tokenizer` are fixed, as are `pixel_mean` and `pixel_std`.
    `duplicates` and `micro_batch_size` can be changed between calls of `fit`. In your
    own training loop, each `model(batch, training=True)` is a step of the maskings.

    Metrics: `loss`, `accuracy` and `temperature`. The accuracy is the mean of two
    fractions within the batch: of images that are most similar to their own text, and
    of texts that are most similar to their own image. Training adds `mask_ratio`, the
    fraction of masked patches.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    @classmethod
    def from_backbone(
        cls,
        backbone: keras.Model,
        *,
        masking: PatchMasking | None = None,
        loss: str | None = None,
        head: str | ContrastiveHead = "linear",
        micro_batch_size: int | None = None,
        duplicates: str = "positive",
        tokenizer: Tokenizer | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from a two-tower keras_hub backbone.

        The model trains the backbone itself, including its projections, temperature and
        bias. After `fit`, `model.save_to_preset(folder)` saves the trained backbone and
        the tokenizer for keras_hub.

        Args:
            backbone: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
                `SigLIPBackbone`, fresh or pre-trained. MetaCLIP 2's text tower pools
                the end token, so each text must have one. SigLIP's text tower takes
                only texts of `max_sequence_length` tokens and pools the last token: pad
                to this length with the end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            loss: `"softmax"` or `"sigmoid"`. Defaults to the loss of `head` or of the
                backbone's family.
            head: `"linear"` uses the projections, temperature and bias of the backbone.
                A `ContrastiveHead` can set the temperature and the bias. By default,
                the scale is limited to 100, or 1000 for SigLIP. A fresh SigLIP, and a
                CLIP with the sigmoid loss, start at a temperature of 0.1 and a bias of
                -10.
            micro_batch_size: See `ContrastiveModel`.
            duplicates: See `ContrastiveModel`.
            tokenizer: See `ContrastiveModel`.
            **kwargs: `pixel_mean`, `pixel_std` and `resize`, which default to the
                values of the backbone's family, and arguments of `keras.Model`, such as
                `name`.

        Returns:
            A model of this class, with the attribute `backbone`.

        Raises:
            ValueError: If the backbone is not supported.
        """
        own = {"image_encoder", "text_encoder", "projection_dim", "dtype"}
        if given := sorted(own & kwargs.keys()):
            raise ValueError(
                f"`{'` and `'.join(given)}` must be omitted, because the backbone "
                "defines its layers: set them when you create the backbone. Received: "
                f"{', '.join(f'{name}={kwargs[name]!r}' for name in given)}"
            )
        own = "pixel_mean", "pixel_std"
        statistics = {name: kwargs.pop(name) for name in own if name in kwargs}
        images, texts, head, resize = parts_of_backbone(
            backbone, masking, loss, head, **statistics
        )
        model = cls(
            images,
            texts,
            head=head,
            micro_batch_size=micro_batch_size,
            duplicates=duplicates,
            tokenizer=tokenizer,
            **{"resize": resize, **kwargs},
        )
        model._backbone = backbone
        return model

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        *,
        masking: PatchMasking | None = None,
        loss: str | None = None,
        head: str | ContrastiveHead = "linear",
        tokenizer: Tokenizer | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from a keras_hub preset of a two-tower backbone.

        Args:
            preset: A folder that `save_to_preset` wrote, its address after an upload,
                such as `"hf://USER/NAME"`, or the name of a preset, such as
                `"clip_vit_base_patch16"`, which keras_hub downloads unless there is a
                folder with this name. Or a MetaCLIP 2 of transformers, as a folder or
                `"hf://..."`, with
                `tokenizer=transformers.AutoTokenizer.from_pretrained(...)`.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            loss: See `from_backbone`.
            head: See `from_backbone`.
            tokenizer: Defaults to the preset's tokenizer, if any: a `CLIPTokenizer` for
                CLIP, and the preprocessor for others.
            dtype: The `dtype` of the backbone.
            **kwargs: Other arguments of `from_backbone`.
        """
        make, preset = import_keras_hub().models.Backbone.from_preset, preset_of(preset)
        backbone = make(preset, dtype=dtype)
        if tokenizer is None:
            tokenizer = load_from_preset(preset, backbone)
        options = {"masking": masking, "loss": loss, "head": head}
        return cls.from_backbone(backbone, tokenizer=tokenizer, **options, **kwargs)

    @classmethod
    def from_encoders(
        cls,
        image: keras.Model | str | os.PathLike,
        text: keras.Model | str | os.PathLike,
        *,
        image_size: int | None = None,
        projection_dim: int | None = 512,
        masking: PatchMasking | None = None,
        head: str | ContrastiveHead = "linear",
        pooling: tuple[str | None, str | None] | None = None,
        image_blocks: int | list[int] | None = None,
        text_blocks: int | list[int] | None = None,
        tokenizer: Tokenizer | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from two encoders that were pre-trained separately.

        Set `trainable = False` on both to train only the projections.

        Args:
            image: A keras_hub `DINOV2Backbone`, `DINOV3Backbone`, `ViTBackbone` or
                `DeiTBackbone`. Or, without a masking, a `ResNetBackbone`,
                `EfficientNetBackbone` or `MobileNetBackbone`. Or the preset of one: a
                name such as `"dinov2_small"`, a folder, or an `"hf://..."` address.
            text: A keras_hub `BertBackbone`, `DistilBertBackbone`, `RobertaBackbone`,
                `XLMRobertaBackbone`, `AlbertBackbone`, `ElectraBackbone` or
                `DebertaV3Backbone`, or a `TextEmbedder` of one. Or the preset of a
                `TextEmbedder`, such as `"all_minilm_l6_v2_en"`.
            image_size: Integer. The side of the images in pixels, for a preset, a
                multiple of its patch size. Defaults to 224.
            projection_dim: Integer. The width of the shared embedding space.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            head: `"linear"`, `"mlp"` or a `ContrastiveHead`, see `ContrastiveModel`.
            pooling: Two strings, for images and for texts: `"class"`, `"mean"`, or
                `"class_and_mean"`. `None` uses the pooling of the family: the class
                token and the mean of the patches for DINO, the class token for ViT and
                DeiT, the mean over all positions for convolutional networks, and the
                mean of all tokens except padding for texts. A `TextEmbedder` has its
                own pooling.
            image_blocks: Integer, the number of last transformer blocks to pool and
                concatenate, or a list of block numbers, from 1. By default, each block
                is pooled by the class token, if there is one, and the mean. The last
                block is pooled after the encoder's norm. `None` pools only the output
                of the encoder. Use several blocks for projections on frozen encoders
                (`docs/how_to/connect_two_encoders.md`).
            text_blocks: As `image_blocks`, for the text encoder.
            tokenizer: Defaults to the preprocessor of a `TextEmbedder`.
            **kwargs: Arguments of `ContrastiveModel`. `pixel_mean` and `pixel_std`
                default to the values of the family of `image`. Convolutional networks
                use ImageNet's values, as most timm models do.

        Reference:
            - [LiT: Zero-Shot Transfer with Locked-image text Tuning](
              https://arxiv.org/abs/2111.07991)
        """
        image, text = image_encoder_of(image, image_size), text_encoder_of(text)
        images, texts, statistics = pretrained_towers(
            image, text, masking, pooling, image_blocks, text_blocks
        )
        if tokenizer is None:
            tokenizer = getattr(text, "preprocessor", None)
        options = {"tokenizer": tokenizer, **statistics, **kwargs}
        return cls(images, texts, projection_dim=projection_dim, head=head, **options)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        make = cls.from_backbone if "backbone" in config else cls
        return from_parts(make, config, custom_objects)

    # === One step of training ===

    @gradients.waits_for_data
    def train_step(self, *args: Any) -> Any:
        """Runs one training step, on every backend.

        Keras passes `(data)` on TensorFlow and torch and `(state, data)` on JAX, and
        computes the gradients and updates. Override `compute_loss` to train on another
        loss.
        """
        return super().train_step(*args)

    def call(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> dict[str, Tensor]:
        # `fit`, `evaluate` and `predict` check their data before the model sees it.
        names = inputs.keys() if isinstance(inputs, dict) else ()
        if "image_features" in names:
            images, texts = inputs["image_features"], inputs["text_features"]
            return {
                "image_embeddings": self.image_tower.project(images, training),
                "text_embeddings": self.text_tower.project(texts, training),
            }
        if not {*KEYS} <= {*names}:
            self.input_rules.check_keys(inputs)
        if not training:
            return self._embed(inputs)
        # TensorFlow may know the number of texts, but not the number of images.
        size = ops.shape(inputs["token_ids"])[0] * replicas.num_replicas()
        noise = self.image_tower.draw_noise(inputs["images"], size)
        if self.micro_batch_size:
            embeddings, extra_losses = embed_in_micro_batches(
                self, self._embed, inputs, noise, self.micro_batch_size
            )
            self.add_loss(extra_losses)
        else:
            embeddings = self._embed(inputs, training, noise)
        if noise is not None:
            self.image_tower.encoder.masking.advance()
        return embeddings

    def _embed(self, inputs, training=False, noise=None):
        """Embeds a batch, or a micro-batch, of images and texts."""
        names = self.text_tower.input_names
        texts = {name: inputs[name] for name in names if name in inputs}
        images = self.image_tower.embed(inputs["images"], training, noise=noise)
        return {
            "image_embeddings": images,
            "text_embeddings": self.text_tower.embed(texts, training),
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
        `super().compute_loss(...)`, the logs show only the loss and the metrics that
        your method updates.

        Args:
            x: The batch, a dictionary.
            y: `None`.
            y_pred: The output of `call`: a dictionary with `"image_embeddings"` and
                `"text_embeddings"`, both `(batch, d)`, L2-normalized.
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
        if self.duplicates == "negative":
            labels = row_labels(texts)
        elif "token_ids" in x:
            family, mask = self.text_tower.family, x.get("padding_mask")
            labels = caption_labels(without_padding(family, x["token_ids"], mask))
        else:
            labels = x["caption_labels"]
        scale, bias = self.head.scale, self.head.logit_bias
        is_split = replicas.batch_is_split(training)
        losses, accuracies = batch_loss(
            loss=self.head.loss,
            weights=[scale] if bias is None else [scale, bias],
            images=images,
            texts=texts,
            labels=labels,
            sample_weight=sample_weight,
            is_split=is_split,
        )
        # A replica may have no rows in evaluation.
        rows = ops.maximum(ops.shape(losses)[0], 1)
        loss = ops.sum(losses) / ops.cast(rows, losses.dtype)
        for extra in self.losses:
            loss = loss + ops.cast(ops.sum(extra), loss.dtype)
        if is_split:
            loss = replicas.local_loss(loss)
            accuracies = replicas.metric_rows(accuracies)
            sample_weight = replicas.metric_rows(sample_weight)
        if training and self.head.is_trained is not None:
            self.head.is_trained.assign(1.0)
        metrics = self.step_means
        metrics["accuracy"].update_state(accuracies, sample_weight)
        metrics["temperature"].update_state(1.0 / scale)
        # Not in the logs of an evaluation, or of a step on features.
        metrics["mask_ratio"].is_updated = False
        if training and "images" in x and self.maskings:
            # One masking gets the patches that another has kept.
            kept = [1.0 - masking.last_mask_ratio for masking in self.maskings]
            ratio = 1.0 - functools.reduce(ops.multiply, kept)
            metrics["mask_ratio"].update_state(replicas.replica_mean(ratio))
        return loss
