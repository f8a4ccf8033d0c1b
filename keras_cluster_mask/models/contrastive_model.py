"""The model for contrastive training on image-text pairs."""

import inspect
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution import replicas
from keras_cluster_mask.distribution.backends import (
    import_keras_hub,
    is_traced,
    preset_of,
)
from keras_cluster_mask.encoders.embedder import Embedder
from keras_cluster_mask.encoders.exported import Exported
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.masked import MaskedEncoder, unmasked
from keras_cluster_mask.encoders.pooled import pretrained_towers
from keras_cluster_mask.encoders.surgery import number_positions
from keras_cluster_mask.encoders.towers import ImageTower, TextTower
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.patch_masking import join
from keras_cluster_mask.masking.selection import StepNoise
from keras_cluster_mask.models.backbones import parts_of_backbone
from keras_cluster_mask.models.head import ContrastiveHead, as_head
from keras_cluster_mask.models.trainer import ContrastiveTrainer
from keras_cluster_mask.training.image_files import read_image_files
from keras_cluster_mask.training.input_rules import KEYS, InputRules, is_numeric
from keras_cluster_mask.training.layers import MadeOfParts, all_layers, as_functional
from keras_cluster_mask.training.micro_batches import embed_in_micro_batches
from keras_cluster_mask.training.tokenizers import (
    check_kind,
    check_tokenizer,
    load_from_preset,
    load_tokenizer,
    save_in_preset,
    save_tokenizer,
    tokenizer_of,
)
from keras_cluster_mask.types import Tensor

# Parts and options that others depend on once the model is made.
FIXED = (
    "backbone",
    "head",
    "image_encoder",
    "image_tower",
    "masking",
    "maskings",
    "pixel_mean",
    "pixel_std",
    "text_encoder",
    "text_tower",
)
CHOICES = {"duplicates": ("positive", "negative"), "resize": ("crop", "squash")}
# Attributes that Keras must not track. Each layer of a tower belongs to the model. A
# tokenizer may be a preprocessor of keras_hub, which adds layers when it is first
# called.
UNTRACKED = ("image_tower", "text_tower", "tokenizer")


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveModel(ContrastiveTrainer, MadeOfParts, Exported, keras.Model):
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
            parts of the images, insert a masking with `kcm.with_masking`.
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
            hidden layer, GELU and dropout, of features that `fit` on `TowerFeatures`
            standardizes. Or a `kcm.models.ContrastiveHead`, to set the initial
            temperature, the bias and the limit of the scale, or to share the head of
            another model. Sharing is not saved: a loaded model has its own head.
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
        image_tower: The `ImageTower` from images to embeddings, without the masking of
            `kcm.with_masking`, for prediction and export.
        text_tower: The `TextTower` from token ids to embeddings. If the text encoder
            has several inputs, the tower takes a dictionary of them.
        tokenizer: The tokenizer of the text encoder, or `None` if it is not known.
            `fit`, `evaluate`, `predict` and the functions for evaluation refuse a
            tokenizer that gives other ids. To replace the tokenizer, assign another
            one, or `None`.
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

    _is_made = False
    _settings = (
        "micro_batch_size",
        "duplicates",
        "pixel_mean",
        "pixel_std",
        "resize",
    )

    def __init__(
        self,
        image_encoder: keras.Model,
        text_encoder: keras.Model,
        loss: str | None = None,
        projection_dim: int | None = None,
        head: str | ContrastiveHead = "linear",
        micro_batch_size: int | None = None,
        duplicates: str = "positive",
        pixel_mean: Sequence[float] | None = CLIP_MEAN,
        pixel_std: Sequence[float] = CLIP_STD,
        resize: str = "crop",
        tokenizer: Any = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        # `from_backbone` passes it.
        backbone = kwargs.pop("_backbone", None)
        # Each part casts its own inputs. With a mixed policy, the model would cast all
        # weights that it passes to micro-batches. A masking must see pixels in full
        # precision.
        super().__init__(dtype="float32", **kwargs)
        self.autocast = False

        # === Layers ===
        encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder}
        for name, encoder in encoders.items():
            if not isinstance(encoder, keras.layers.Layer):
                raise ValueError(
                    f"`{name}` must be a Keras model that returns features. "
                    f"Received: {name}={encoder!r}"
                )
        self.image_encoder = as_functional(image_encoder)
        self.text_encoder = as_functional(text_encoder)
        self.head = head = as_head(head, loss, projection_dim, dtype)
        self.backbone = backbone
        is_borrowed = head.projection_dim is None and head.image_projection is not None
        if backbone is None and is_borrowed:
            raise ValueError(
                "`head` must not hold the projections of a backbone: pass it to "
                f"`from_backbone`, with that backbone. Received: head={head.name}"
            )
        number_positions(self.image_encoder)
        self.image_tower = ImageTower(
            unmasked(self.image_encoder),
            head.image_projection,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            name="image_tower",
        )
        self.text_tower = TextTower(
            self.text_encoder, head.text_projection, name="text_tower"
        )
        # An object that Keras does not look into.
        self._cache = types.SimpleNamespace(weights=None)
        head.build(*map(_features_shape, (self.image_encoder, self.text_encoder)))

        # === Config ===
        self.maskings = [
            x for x in all_layers(self.image_encoder) if isinstance(x, PatchMasking)
        ]
        self.masking = self.maskings[0] if self.maskings else None
        self.pixel_mean = None if pixel_mean is None else [*map(float, pixel_mean)]
        self.pixel_std = None if pixel_std is None else [*map(float, pixel_std)]
        self.micro_batch_size = micro_batch_size
        self.duplicates = duplicates
        self.resize = resize
        self.tokenizer = tokenizer
        for masking in self.maskings:
            join(masking, self.image_tower.prepare)
        # Everything is built, unless an encoder learns its width when it is called.
        self.built = all(x.built for x in all_layers(self) if x is not self)
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and self._is_made:
            raise AttributeError(
                f"`{name}` of a model is fixed: make a new `ContrastiveModel`, which "
                f"may have the same encoders and head. Received: {name}={value}"
            )
        if name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif name == "micro_batch_size":
            value = check_integer(name, value, or_none=True)
        elif name == "tokenizer" and value is not None:
            check_kind(value)
        if name in UNTRACKED:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

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
        tokenizer: Any = None,
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
                A `ContrastiveHead` without `projection_dim` can set the temperature and
                the bias. By default, the scale is limited to 100, or 1000 for SigLIP. A
                fresh SigLIP, and a CLIP with the sigmoid loss, start at a temperature
                of 0.1 and a bias of -10.
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
                f"`{'` and `'.join(given)}` must be left out, since the backbone "
                "defines its layers: set them when you make the backbone. Received: "
                f"{', '.join(f'{name}={kwargs[name]!r}' for name in given)}"
            )
        images, texts, options = parts_of_backbone(backbone, masking, loss, head)
        return cls(
            images,
            texts,
            micro_batch_size=micro_batch_size,
            duplicates=duplicates,
            tokenizer=tokenizer,
            _backbone=backbone,
            **{**options, **kwargs},
        )

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        masking: PatchMasking | None = None,
        loss: str | None = None,
        head: str | ContrastiveHead = "linear",
        tokenizer: Any = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from a keras_hub preset of a two-tower backbone.

        Args:
            preset: A folder that `save_to_preset` wrote, or the name of a preset, such
                as `"clip_vit_base_patch16"`, which keras_hub downloads unless there is
                a folder with this name. Or a MetaCLIP 2 of transformers, as a folder or
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
        image: keras.Model,
        text: keras.Model,
        *,
        projection_dim: int | None = None,
        masking: PatchMasking | None = None,
        head: str | ContrastiveHead = "linear",
        pooling: tuple[str | None, str | None] | None = None,
        image_blocks: int | list[int] | None = None,
        text_blocks: int | list[int] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from two encoders that were pre-trained separately.

        Set `trainable = False` on both to train only the projections.

        Args:
            image: A keras_hub `DINOV2Backbone`, `DINOV3Backbone`,
                `ViTBackbone` or `DeiTBackbone`. Or, without a masking, a
                `ResNetBackbone`, `EfficientNetBackbone` or `MobileNetBackbone`.
            text: A keras_hub `BertBackbone`, `DistilBertBackbone`,
                `RobertaBackbone`, `XLMRobertaBackbone`, `AlbertBackbone`,
                `ElectraBackbone` or `DebertaV3Backbone`, or a `TextEmbedder` of one.
            projection_dim: Integer. The width of the shared embedding space. Defaults
                to 512, or to the width of a `ContrastiveHead`.
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
        if projection_dim is None and not isinstance(head, ContrastiveHead):
            projection_dim = 512
        images, texts, statistics = pretrained_towers(
            image, text, masking, pooling, image_blocks, text_blocks
        )
        if tokenizer is None:
            tokenizer = getattr(text, "preprocessor", None)
        options = {"tokenizer": tokenizer, **statistics, **kwargs}
        return cls(images, texts, projection_dim=projection_dim, head=head, **options)

    # === From inputs to embeddings ===

    def encode_image(self, images: Any, training: bool | None = None) -> Any:
        """Embeds images.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        photos = [np.zeros((120, 80, 3), "uint8"), np.zeros((60, 90, 3), "uint8")]
        model.encode_image(photos).shape  # (2, 96)
        ```

        Args:
            images: `(batch, H, W, C)` tensor, uint8 or normalized floats. Or a list of
                images of any size: paths, `PIL.Image.Image` and uint8 arrays
                `(height, width, 3)`, which are resized according to `resize`. Or one
                path or `PIL.Image.Image`, as a batch of one.
            training: Python boolean. If true, the masking leaves out parts of the
                images. The state of a masking advances only in training calls of the
                model.

        Returns:
            `(batch, d)` float32 tensor, L2-normalized. For a list, a NumPy array. For
            one image, a NumPy array `(1, d)`.

        Raises:
            ValueError: If an image cannot be read, or is not valid for the encoder.
        """
        if (listed := _as_list("images", images)) is not None:
            read = read_image_files(
                listed, self.preprocessing["image_size"], self.resize
            )
            if not training:
                return np.concatenate([*map(self._embedder.images, read)])
            images = np.concatenate([*read])
        if not is_traced(images):
            self.input_rules.check_images(images)
        noise = StepNoise(ops.shape(images)[0]) if training else None
        return self._embed_images(images, training, noise)

    def encode_text(self, texts: Any, training: bool | None = None) -> Any:
        """Embeds texts.

        Example:

        ```python
        tokenizer = kcm.data.CLIPTokenizer.train(["a dog in the snow"], 600)
        backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
        model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
        model.encode_text(["a dog", "snow"]).shape  # (2, 96)
        ```

        Args:
            texts: List of strings, or one string as a batch of one, for the
                `tokenizer` of the model. Or token ids, a `(batch, T)` int tensor, or a
                dictionary of tensors if the text encoder has further inputs:
                `{"token_ids": ..., "padding_mask": ...}`.
            training: Python boolean, passed to the text encoder.

        Returns:
            `(batch, d)` float32 tensor, L2-normalized. For strings, a NumPy array. For
            one string, a NumPy array `(1, d)`.

        Raises:
            ValueError: If the model has no tokenizer for strings, if the ids are not
                valid for the text encoder, or if the dictionary does not match its
                inputs.
        """
        if (listed := _as_list("texts", texts)) is not None:
            texts = listed
            others = [x for x in listed if not isinstance(x, str | bytes)]
            if not others:
                texts = tokenizer_of(self)(listed)
                if not training:
                    return self._embedder.texts(texts)
            elif len(others) < len(listed) or not hasattr(others[0], "__len__"):
                raise ValueError(
                    "`texts` must be strings, or rows of token ids. "
                    f"Received: {others[0]!r} among {len(listed)} texts"
                )
        given = texts if isinstance(texts, dict) else {"token_ids": texts}
        if "token_ids" in given and not is_traced(given["token_ids"]):
            self.input_rules.check_ids(given["token_ids"], "padding_mask" in given)
            given = self.text_tower.lengths.cut_on_host(given)
        return self.text_tower.embed(given, training)

    def search(self, photos: Any, text: str, k: int = 5) -> list[Any]:
        """Finds the images that a text describes best.

        Example:

        ```python
        tokenizer = kcm.data.CLIPTokenizer.train(["a dog in the snow"], 600)
        backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
        model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
        photos = [np.full((64, 64, 3), level, "uint8") for level in (0, 100, 200)]
        model.search(photos, "a dog", k=2)  # two of the three images
        embeddings = model.encode_image(photos)
        model.search(embeddings, "a dog", k=2)  # their numbers
        ```

        Args:
            photos: List of images, as `encode_image` takes them, such as paths. Or
                their embeddings, `(images, d)`, to search the same images for several
                texts: keep these in place of embedding the images again.
            text: String.
            k: Integer. The number of images to find. Defaults to `5`.

        Returns:
            List of the `k` best images, best first; or of their numbers in
            `embeddings`. All of them, if there are fewer.

        Raises:
            ValueError: If an argument is invalid, if an image cannot be read, or if the
                model has no tokenizer.
        """
        check_integer("k", k, 1)
        if not isinstance(text, str):
            raise ValueError(
                f"`text` must be a string: search once for each. Received: text={text}"
            )
        is_list = isinstance(photos, list | tuple)
        embeddings = self.encode_image([*photos]) if is_list else photos
        embeddings = ops.convert_to_numpy(embeddings)
        wanted = self.encode_text(text)
        if embeddings.ndim != 2 or embeddings.shape[1] != wanted.shape[1]:
            raise ValueError(
                "`photos` must be a list of images, or their embeddings, of shape "
                f"(images, {wanted.shape[1]}). Received: an array of shape "
                f"{embeddings.shape}"
            )
        best = np.argsort(-(embeddings @ wanted[0]), kind="stable")[:k].tolist()
        return [photos[number] for number in best] if is_list else best

    def _embed_images(self, images, training=False, noise=None):
        encoder = None if noise is None else self.image_encoder
        return self.image_tower.embed(images, training, noise=noise, encoder=encoder)

    def _embed(self, inputs, training=False, noise=None):
        """Embeds a batch, or a micro-batch, of images and texts."""
        names = self.text_tower.input_names
        texts = {name: inputs[name] for name in names if name in inputs}
        return {
            "image_embeddings": self._embed_images(inputs["images"], training, noise),
            "text_embeddings": self.text_tower.embed(texts, training),
        }

    # === One step of training ===

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
        # A replica's rows get the same masks as in the global batch.
        # TensorFlow may know the number of texts, but not the number of images.
        size = ops.shape(inputs["token_ids"])[0] * replicas.num_replicas()
        noise = StepNoise(size, replicas.local_rows)
        if self.micro_batch_size:
            embeddings, extra_losses = embed_in_micro_batches(
                self, self._embed, inputs, noise, self.micro_batch_size
            )
            self.add_loss(extra_losses)
        else:
            embeddings = self._embed(inputs, training, noise)
        for masking in self.maskings:
            masking.advance()
        return embeddings

    # === Inputs, and other models that share the weights ===

    @property
    def _embedder(self):
        # Made once, because it compiles both towers, and again when LoRA adds weights,
        # which a function compiled by TensorFlow would not read.
        weights, cache = [id(weight) for weight in self.weights], self._cache
        if cache.weights != weights:
            cache.weights, cache.embedder = weights, Embedder(self)
        return cache.embedder

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """How data becomes inputs: `"tokenizer"`, `"image_size"` and `"resize"`.

        The image size is `(height, width)`. Height and width are `None` if the image
        encoder accepts any size or does not define one.
        """
        found = {
            "tokenizer": self.tokenizer,
            "image_size": self.image_tower.image_size,
            "resize": self.resize,
        }
        # Keras would save the tokenizer as a part of a dictionary.
        return types.MappingProxyType(found)

    @property
    def input_rules(self) -> InputRules:
        """The `InputRules` for images and token ids."""
        images, texts = self.image_tower, self.text_tower
        has_mask = "padding_mask" in texts.input_names
        return InputRules(
            text_inputs=texts.input_names,
            image_shape=images.sample_shape,
            text_shape=texts.sample_shape,
            context_length=texts.context_length,
            vocabulary_size=getattr(self.text_encoder, "vocabulary_size", None),
            end_token_id=texts.family.end_id,
            padding_id=texts.family.padding_id if has_mask else None,
            pixel_range=images.pixel_range,
        )

    @property
    def input_specs(self) -> dict[str, Any]:
        """The `keras.InputSpec` of each input, for `export`."""
        texts = self.text_tower.input_specs
        texts = texts if isinstance(texts, dict) else {"token_ids": texts}
        return {"images": self.image_tower.input_specs, **texts}

    def without_masking(self) -> Self:
        """Makes a model with the same weights and no masking, to save it.

        Its file opens in programs that do not have the class of a masking of your own.
        The models share encoders, projections, temperature and bias. To train on whole
        images, set `model.masking.mask_ratio = 0.0` instead.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        half = kcm.RandomMasking(0.5)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=half)
        model.without_masking().save("model.keras")
        ```

        Returns:
            A model of the same class, not compiled. A subclass is made from its
            `get_config`, as when it is loaded.

        Raises:
            ValueError: If the image encoder has a masking that `kcm.with_masking` did
                not insert, or if a subclass has arguments that its `get_config` omits,
                or weights that the new model would not share.
        """
        parts = {name: unmasked(getattr(self, name)) for name in self._parts}
        config = {**self.get_config(), **parts, "omitted": None}
        if self.backbone is not None:
            config["masking"] = None
        known = {*config, *inspect.signature(ContrastiveModel.__init__).parameters}
        omitted = [
            key
            for key, x in inspect.signature(self.__init__).parameters.items()
            if key not in known and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
        if omitted:
            raise ValueError(
                f"`get_config` of `{type(self).__name__}` must return all arguments, "
                f"to make the new model. Received: {omitted} are left out"
            )
        whole = type(self).from_config(config)
        whole.tokenizer = self.tokenizer
        masks = {id(v) for masking in self.maskings for v in masking.weights}
        if {id(v) for v in self.weights} - masks != {id(v) for v in whole.weights}:
            raise ValueError(
                "A model must have its masking from `kcm.with_masking`, which can "
                "remove it, and weights only in its encoders and head. Received: a "
                f"{type(self).__name__} with other weights, and maskings "
                f"{[masking.name for masking in self.maskings]}"
            )
        return whole

    # === What Keras shows and saves ===

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The encoders, the head, and layers of a subclass, with each weight once."""
        hidden = (*self.maskings, self.backbone)
        return [x for x in super().layers if not any(x is y for y in hidden)]

    def summary(self, *args: Any, **kwargs: Any) -> None:
        # Keras shows the output shape of a layer that was called on symbols.
        shapes = [*map(_features_shape, (self.image_encoder, self.text_encoder))]
        if all(shape[-1] is not None for shape in shapes):
            self.head(*map(keras.KerasTensor, shapes))
        if isinstance(self.image_encoder, MaskedEncoder):
            self.image_encoder(self.image_encoder.input)
        super().summary(*args, **kwargs)

    @property
    def _parts(self) -> tuple[str, ...]:
        if self.backbone is None:
            return "image_encoder", "text_encoder", "head"
        return "backbone", "masking", "head"

    @classmethod
    def _make(cls, **arguments: Any) -> Self:
        return (cls.from_backbone if "backbone" in arguments else cls)(**arguments)

    # Keras calls both for a `.keras` file. It then saves or loads the assets of each
    # layer that a property returns, such as a tokenizer's.

    def save_assets(self, dir_path: str) -> None:
        """Writes the tokenizer. Keras calls it in `save`."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, dir_path)

    def load_assets(self, dir_path: str | None) -> None:
        """Loads the tokenizer. Keras calls it in `keras.saving.load_model`."""
        found = None if dir_path is None else load_tokenizer(dir_path)
        # A subclass may have made its own.
        self.tokenizer = self.tokenizer if found is None else found

    def save_to_preset(
        self, preset_dir: str | os.PathLike, tokenizer: Any = None
    ) -> None:
        """Writes the backbone and its tokenizer as a preset, which keras_hub loads.

        Args:
            preset_dir: str or path of a folder.
            tokenizer: A `CLIPTokenizer`, or a keras_hub preprocessor. keras_hub does
                not load a Hugging Face tokenizer, but `from_preset` does. Defaults to
                the tokenizer of the model.

        Raises:
            ValueError: If the tokenizer does not match the model, if there is no
                tokenizer, or if the model has no backbone.
        """
        if self.backbone is None:
            raise ValueError(
                "`save_to_preset` is for models of `from_backbone`: save another one "
                f"with `model.save`. Received: model={self.name} without a backbone"
            )
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given for a model without one. To save only the "
                "backbone, call `model.backbone.save_to_preset`. Received: "
                "tokenizer=None"
            )
        check_tokenizer(self, tokenizer)
        folder = os.path.expanduser(preset_dir)
        self.backbone.save_to_preset(folder)
        save_in_preset(tokenizer, folder)


def _as_list(name, values):
    """Returns a list of items to read, or `None` for an array or a tensor."""
    if isinstance(values, Mapping):
        return None
    if hasattr(values, "shape"):
        if is_numeric(values):
            return None
        # Strings, such as a tensor of TensorFlow.
        values = np.atleast_1d(as_array(values))
    is_single = isinstance(values, str | bytes) or not hasattr(values, "__iter__")
    found = [values] if is_single else list(values)
    if not found:
        raise ValueError(
            f"`{name}` must hold at least one item. Received: {name}={values!r}"
        )
    return found


def _features_shape(encoder):
    return getattr(getattr(encoder, "output", None), "shape", (None, None))
