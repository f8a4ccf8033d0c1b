"""How two towers embed images and texts in one space."""

import os
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.encoders.embedder import Embedder
from keras_cluster_mask.models.two_towers import TwoTowers
from keras_cluster_mask.training.image_files import read_image_files
from keras_cluster_mask.training.input_rules import InputRules, is_numeric
from keras_cluster_mask.training.model_tokenizer import tokenizer_of


class DualEncoder(TwoTowers):
    """Embeds images and texts. The base class of the trainer of `ContrastiveModel`."""

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
        noise = self.image_tower.draw_noise(images) if training else None
        return self.image_tower.embed(images, training, noise=noise)

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
                "`text` must be a string: search for one text at a time. Received: "
                f"text={text}"
            )
        if isinstance(photos, str | os.PathLike):
            raise ValueError(
                "`photos` must be a list of images, or their embeddings. For the "
                "images in a folder, pass `sorted(glob.glob('photos/*.jpg'))`. "
                f"Received: photos={photos}"
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

    @property
    def _embedder(self):
        # Made once, because it compiles both towers, and again when LoRA adds weights,
        # which a function compiled by TensorFlow would not read.
        weights, held = [id(weight) for weight in self.weights], self._held
        if held.embedder is None or held.embedder[0] != weights:
            held.embedder = weights, Embedder(self)
        return held.embedder[1]

    # === Inputs ===

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
            f"`{name}` must contain at least one item. Received: {name}={values!r}"
        )
    return found
