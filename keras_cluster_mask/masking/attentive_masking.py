from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class AttentiveMasking(PatchMasking):
    """Keeps the patches that a teacher's class token attends to most.

    Implements the selection of A-CLIP. A teacher, an exponential moving average (EMA)
    of the encoder, reads each whole image. The score of a patch is the attention of the
    teacher's class token to it, averaged over all layers and heads and over the square
    block that holds the patch. Whole blocks are kept. Of the last block, random patches
    are kept to reach the exact number.

    The teacher is updated once per training step, after it has read the images. At the
    start, the teacher has the initial encoder's weights, so its attention is random if
    the encoder is trained from scratch.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    # Reads images of half the size, one token for each 2 x 2 patches.
    teacher = kcm.models.MomentumEncoder(backbone.vision_encoder, image_size=16)
    masking = kcm.AttentiveMasking(teacher, mask_ratio=0.5, block_size=2)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    ```

    Args:
        teacher: A `kcm.models.MomentumEncoder` of the encoder that the masking is
            inserted into. The teacher then follows this encoder. At the encoder's image
            size, the teacher adds about a third to the cost of an unmasked step of the
            image encoder. At half the size, it adds about a twelfth.
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        block_size: Integer. The side of a block, in patches, which must divide both
            sides of the grid. The teacher must see a whole number of patches per block,
            at least one.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept. `None` infers it from the number of patches.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: `(batch, prefix + N, dim)` tensor, `N = (H / p) (W / p)`.
        images: `(batch, H, W, C)` tensor (or channels first), normalized for the
            encoder. `kcm.with_masking` passes the images that the encoder reads.
        training: Python boolean. Tokens are left out only if it is true.
        noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.

    Returns:
        `(batch, prefix + K, dim)` tensor of the same dtype as `tokens`.

    Raises:
        ValueError: When called, if blocks do not fill the grid of patches or do not fit
            the teacher's grid, if the images are missing, or, in training, if the
            teacher follows no encoder.

    Reference:
        - [Attentive Mask CLIP](https://arxiv.org/abs/2212.08653)
        - [Official code](https://github.com/microsoft/A-CLIP), which keeps only whole
          blocks, one more than half: 100 of 196 patches.
    """

    _settings = (*PatchMasking._settings, "block_size")

    def __init__(
        self,
        teacher: keras.layers.Layer,
        mask_ratio: float = 0.5,
        block_size: int = 2,
        num_prefix_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        # Otherwise the teacher's weights would be read in half precision.
        kwargs.setdefault("dtype", "float32")
        super().__init__(mask_ratio, num_prefix_tokens, seed, **kwargs)
        if isinstance(teacher, dict):
            teacher = keras.saving.deserialize_keras_object(teacher)
        if not callable(getattr(teacher, "attention", None)):
            raise ValueError(
                "`teacher` must be a `kcm.models.MomentumEncoder`. "
                f"Received: teacher={teacher} of type {type(teacher).__name__}"
            )
        self.teacher = teacher
        self.block_size = check_integer("block_size", block_size)
        self.patch_size = teacher.patch_size
        self.data_format = teacher.data_format

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        blocks = self._grid_of_blocks(self.grid_shape(noise.shape[1], images))
        attention = self.teacher.attention(images)
        return block_means(attention, self.teacher.grid, blocks, self.block_size)

    def _grid_of_blocks(self, grid):
        if any(side % self.block_size for side in grid):
            raise ValueError(
                "`block_size` must divide the rows and the columns of patches. "
                f"Received: block_size={self.block_size}, a grid of {grid}"
            )
        blocks = tuple(side // self.block_size for side in grid)
        if any(side % count for side, count in zip(self.teacher.grid, blocks)):
            raise ValueError(
                "The grid of `teacher` must be divisible by the grid of blocks, "
                f"{blocks[0]} x {blocks[1]}: pass another `image_size` to the teacher. "
                f"Received: a teacher with a grid of {self.teacher.grid}, images with "
                f"a grid of {grid}, block_size={self.block_size}"
            )
        return blocks

    def enter(self, encoder: keras.Model, embedding: keras.layers.Layer) -> None:
        self.teacher.follow(encoder)

    def check_ready(self) -> None:
        super().check_ready()
        self.teacher.check_ready()

    def advance(self) -> None:
        self.teacher.update()

    def _own_variables(self):
        # Keras saves the teacher's variables with the teacher.
        theirs = {id(v) for v in self.teacher.variables}
        return [v for v in self.variables if id(v) not in theirs]

    def settings(self) -> dict[str, Any]:
        # Omit the teacher's encoder: its configuration has numbered layer names. The
        # shapes of the teacher's weights are compared instead.
        teacher = {x: getattr(self.teacher, x) for x in self.teacher._settings}
        return {**super().settings(), "teacher": teacher}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "teacher": keras.saving.serialize_keras_object(self.teacher),
        }


def block_means(values, grid, blocks, block_size):
    """Computes the mean of each block, repeated for all patches of the block.

    Args:
        values: `(batch, rows * columns)` tensor, in row-major order.
        grid: `(rows, columns)` of the values.
        blocks: `(rows, columns)` of blocks, which divide `grid`.
        block_size: Integer, the side of a block of the result.

    Returns:
        `(batch, blocks * block_size ** 2)` tensor, in row-major order.
    """
    (rows, columns), (height, width) = blocks, (g // b for g, b in zip(grid, blocks))
    values = ops.reshape(values, (-1, rows, height, columns, width))
    means = ops.mean(values, axis=(2, 4))
    means = ops.repeat(ops.repeat(means, block_size, axis=1), block_size, axis=2)
    return ops.reshape(means, (-1, rows * columns * block_size**2))
