import functools

from keras_cluster_mask.models.masked_encoder import MaskedEncoder
from keras_cluster_mask.models.tower import Tower


class SharedWeights:
    """The models that a `ContrastiveModel` gives away, all of its own weights."""

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
            pixel_statistics=self.pixel_statistics,
            name="image_tower",
        )

    @functools.cached_property
    def text_tower(self):
        """A `Tower` from token ids to embeddings: what `encode_text` computes."""
        return Tower.of(self.text_encoder, self.text_features, name="text_tower")

    def without_masking(self):
        """Makes a model of the same weights that trains on whole images.

        For the last epochs: what was pre-trained on parts of images gains from some
        training on whole ones. Encoders, projections, temperature and bias are
        shared, so training one trains the other; only the optimizer is new.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_clip(backbone, kcm.RandomMasking(0.5))
        # model.compile(...), model.fit(...), and then:
        whole = model.without_masking()
        whole.compile(optimizer=keras.optimizers.AdamW(1e-5))
        ```

        Returns:
            A model of the same class, to be compiled anew.

        Raises:
            ValueError: If a masking was put into an encoder by other means than
                `kcm.with_masking`.

        Reference:
            - [Scaling Language-Image Pre-training via Masking](
              https://arxiv.org/abs/2212.00794) for unmasked tuning.
        """
        arguments = self.arguments()
        if "masking" in arguments:
            arguments["masking"] = None
        elif isinstance(self.image_encoder, MaskedEncoder):
            arguments["image_encoder"] = self.image_encoder.encoder
        whole = type(self)(**arguments, heads_of=self)
        if whole.maskings:
            raise ValueError(
                "`image_encoder` must have its masking from `kcm.with_masking`, which "
                "can take it out again. Received: an encoder with the maskings "
                f"{[masking.name for masking in whole.maskings]}"
            )
        return whole
