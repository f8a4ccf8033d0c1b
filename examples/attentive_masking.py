"""Trains CLIP on the patches that the class token of a teacher attends to (A-CLIP).

The teacher is a moving average of the image encoder, and reads whole images. The score
of a patch is the attention of the teacher's class token to it, averaged over all layers
and heads, and over square blocks of patches. The blocks with the highest scores are
kept. From the last block, random patches are kept to reach the exact number. Each step
uses two random crops of each image, and compares each crop with the text. With
`--views 1`, the program trains on one crop.

    python examples/attentive_masking.py

In batches of 64, it takes about two minutes (JAX, two cores of an AMD EPYC). It needs a
keras_hub CLIP.

The masking updates the teacher in the compiled step. On JAX, a callback would have to
copy the weights out of the step. On TensorFlow, the program runs on one device.

It differs from A-CLIP in these points:

- The teacher reads each crop, not a larger crop that contains both.
- The loss has no terms between the crops (SimCLR, BYOL), and there is no color jitter.
- The number of kept patches is exact. For a half, the official code keeps 100 of 196.

Attentive Mask CLIP: https://arxiv.org/abs/2212.08653
"""

import argparse
import math
import os
import types

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
import keras
from keras import ops

import keras_cluster_mask as kcm

# The smallest area of a crop, as a share of the image, and its largest aspect ratio.
MIN_AREA, MAX_RATIO = 0.5, 4 / 3


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description="Trains CLIP on the patches that a teacher attends to (A-CLIP).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    images = kcm.data.example_images() / "train-*.tar"
    add("--train", default=images, help="shards to train on")
    add("--mask-ratio", type=float, default=0.5, help="fraction of patches to drop")
    add("--block-size", type=int, default=2, help="side of a block, in patches")
    add("--views", type=int, default=2, help="crops of an image in a step")
    add("--momentum", type=float, default=0.996, help="of the teacher at the start")

    add("--image-size", type=int, default=48, help="in pixels")
    add("--batch-size", type=int, default=64, help="over all devices together")
    add("--epochs", type=int, default=8, help="passes over the samples")
    add("--seed", type=int, default=0, help="of the weights, crops and masks")
    return parser.parse_args(arguments)


# === The masking ===


class AttentiveMasking(kcm.PatchMasking):
    """Keeps the patches that the class token of a teacher attends to most.

    Args:
        encoder: The `CLIPVisionEncoder` that is trained. The teacher starts as a copy.
        mask_ratio: The fraction of the patches to drop.
        block_size: The side of a block in patches. It divides the sides of the grid.
        momentum: The momentum of the teacher at the start.
        steps: The number of steps over which the momentum rises to 1.
        seed: The seed of the noise.
    """

    def __init__(self, encoder, mask_ratio, block_size, momentum, steps, seed=None):
        super().__init__(mask_ratio, seed=seed)
        self.patch_size = encoder.patch_size
        self.block_size = block_size
        self.momentum = momentum
        self.steps = steps
        config = {**encoder.get_config(), "name": "teacher"}
        self.teacher = type(encoder).from_config(config)
        self.teacher.set_weights(encoder.get_weights())
        self.teacher.trainable = False
        self.num_updates = self.add_weight(
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            name="updates",
        )
        # In an object that Keras does not track: the encoder contains the masking.
        self._student = types.SimpleNamespace(weights=encoder.weights)

    def score(self, noise, images=None, tokens=None):
        grid = self.grid_shape(noise.shape[1], images)
        if any(side % self.block_size for side in grid):
            raise ValueError(
                "`--block-size` must divide the rows and columns of patches. Received: "
                f"{self.block_size}, a grid of {grid}"
            )
        return block_means(class_attention(self.teacher, images), grid, self.block_size)

    def advance(self):
        """Moves the teacher towards the encoder, once in each step."""
        progress = ops.minimum(ops.cast(self.num_updates, "float32") / self.steps, 1.0)
        share = (1.0 - self.momentum) * (1.0 + ops.cos(math.pi * progress)) / 2.0
        for own, other in zip(self.teacher.weights, self._student.weights):
            if other.trainable:
                change = ops.stop_gradient(ops.convert_to_tensor(other)) - own
                own.assign(own + share * change)
        self.num_updates.assign_add(1)


def class_attention(encoder, images):
    """Returns the attention of a CLIP's class token to each patch, `(batch, N)` floats.

    It is the mean over all layers and heads. The attention to the class token itself is
    dropped.
    """
    tokens = encoder.pre_layer_norm(encoder.embedding(images))
    rows = []
    for block in encoder.encoder_layers:
        normalized, attention = block.layer_norm_1(tokens), block.attention
        query = ops.cast(attention.query_dense(normalized[:, :1]), "float32")
        key = ops.cast(attention.key_dense(normalized), "float32")
        logits = ops.einsum("bqhd,bkhd->bhqk", query, key) / attention.key_dim**0.5
        rows.append(ops.mean(ops.softmax(logits), axis=(1, 2)))
        tokens = block(tokens)
    return sum(rows)[:, 1:] / len(rows)


def block_means(values, grid, block_size):
    """Returns the mean of each block, for each of its patches.

    Args:
        values: `(batch, N)` tensor.
        grid: The rows and columns of patches.
        block_size: The side of a block in patches.
    """
    sizes = {"p": block_size, "q": block_size}
    sizes |= {"h": grid[0] // block_size, "w": grid[1] // block_size}
    means = ops.mean(
        ops.rearrange(values, "b (h p w q) -> b h w (p q)", **sizes), axis=-1
    )
    means = ops.repeat(means[..., None], block_size**2, axis=-1)
    return ops.rearrange(means, "b h w (p q) -> b (h p w q)", **sizes)


# === The views ===


class CroppingModel(kcm.ContrastiveModel):
    """Compares several crops of each image, each with its own mask, with the text."""

    num_views = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.crop_seed = keras.random.SeedGenerator()

    def call(self, inputs, training=None):
        if not training:
            return super().call(inputs)
        pixels = self.image_tower.prepare(inputs["images"])
        first, *others = (
            random_crops(pixels, self.crop_seed) for _ in range(self.num_views)
        )
        # In this call, the masking updates the teacher.
        outputs = super().call({**inputs, "images": first}, training=True)
        others = [self.encode_image(crops, training=True) for crops in others]
        return {**outputs, "views": [outputs["image_embeddings"], *others]}

    def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
        views = y_pred.get("views", [y_pred["image_embeddings"]])
        loss = 0.0
        for view in views:
            pairs = {**y_pred, "image_embeddings": view}
            loss += super().compute_loss(x, y, pairs, *args, **kwargs)
        return loss / len(views)


def random_crops(images, seed):
    """Returns a random crop of each image, resized to the image size (bilinear)."""

    def draw(low, high):
        return keras.random.uniform((ops.shape(images)[0], 1, 1), low, high, seed=seed)

    area = draw(MIN_AREA, 1.0)
    ratio = ops.exp(draw(-math.log(MAX_RATIO), math.log(MAX_RATIO)))
    height, width = (
        interpolation(ops.minimum(ops.sqrt(square), 1.0), draw(0.0, 1.0), size)
        for square, size in zip((area * ratio, area / ratio), images.shape[1:3])
    )
    rows = ops.einsum("bih,bhwc->biwc", height, images)
    return ops.einsum("bjw,biwc->bijc", width, rows)


def interpolation(side, place, size):
    """Returns the weight of each old pixel in each new pixel, along one axis.

    Args:
        side: The share of the axis that the crop covers, from 0 to 1.
        place: The position of the crop: 0 at the start of the axis, 1 at the end.
        size: The number of pixels.

    Returns:
        `(batch, size, size)` tensor. Each row sums to 1.
    """
    pixels = ops.arange(size, dtype="float32")
    seen = place * (1.0 - side) + side * (pixels[:, None] + 0.5) / size
    centers = ops.clip(seen * size - 0.5, 0.0, size - 1.0)
    return ops.relu(1.0 - ops.abs(centers - pixels))


def main(args):
    keras.utils.set_random_seed(args.seed)
    captions = kcm.data.read_captions(args.train)
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=16)
    dataset = kcm.data.image_text_dataset(
        args.train, tokenizer, args.image_size, args.batch_size, training=True
    )
    backbone = kcm.models.clip_backbone(
        "tiny", args.image_size, tokenizer.vocabulary_size, tokenizer.context_length
    )
    masking = AttentiveMasking(
        backbone.vision_encoder,
        args.mask_ratio,
        args.block_size,
        args.momentum,
        steps=args.epochs * dataset.steps_per_epoch,
        seed=args.seed,
    )
    model = CroppingModel.from_backbone(backbone, masking=masking)
    model.num_views = args.views
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(dataset, epochs=args.epochs)
    return model


if __name__ == "__main__":
    main(parse())
