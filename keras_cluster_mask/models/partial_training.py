"""Trains a part of pre-trained encoders: their last blocks, or LoRA."""

from collections.abc import Sequence

import keras

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.encoders import BLOCKS, check_no_lora
from keras_cluster_mask.training.layers import all_layers, weights_by_layers

# The names of the query and value projections in keras_hub. Those of DINOv3 end in
# "proj".
LORA_LAYERS = ("query", "value", "q_proj", "v_proj")


def train_last_blocks(model: ContrastiveModel, image: int = 2, text: int = 0) -> None:
    """Freezes both encoders, except for their last transformer blocks.

    What follows the last block, such as the final normalization, is trained with it.
    Projections and temperature are trained as before. The backward pass ends at the
    first trained block, so activations of the frozen blocks before it are not kept.

    Compile the model afterwards. `fit` raises an error until then.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))
    kcm.train_last_blocks(model, image=2, text=1)
    model.compile(keras.optimizers.AdamW(1e-5))
    ```

    Args:
        model: A `ContrastiveModel` whose encoders have transformer blocks of keras_hub:
            ViT, DeiT, DINOv2, DINOv3, BERT, DistilBERT, RoBERTa, CLIP, MetaCLIP 2 or
            SigLIP.
        image: Integer. The number of blocks of the image encoder to train. 0 freezes
            the encoder. All blocks are trained without the embedding layer.
        text: Integer. The number of blocks of the text encoder to train.

    Raises:
        ValueError: If an encoder has fewer blocks, or LoRA.
    """
    images, texts = model.image_encoder, model.text_encoder
    image_start = _start_of_last_blocks(images, "image", image)
    text_start = _start_of_last_blocks(texts, "text", text)
    _freeze_weights(images, image_start)
    _freeze_weights(texts, text_start)
    model.compiled = False


def enable_lora(
    model: ContrastiveModel,
    rank: int = 8,
    image: bool = True,
    text: bool = False,
    layer_names: Sequence[str] = LORA_LAYERS,
) -> None:
    """Freezes both encoders, and trains low-rank updates of some of their matrices.

    An update is the product of two matrices of `rank` columns and rows (LoRA), in
    float32. It starts at zero. Projections and temperature are trained as before.

    Compile the model afterwards. `fit` raises an error until then.

    A `.keras` file, and a preset, hold the sum of each matrix and its update. The
    loaded model has the same outputs and no LoRA, and its encoders are frozen: call
    `enable_lora` again to train it further. A `kcm.callbacks.Checkpoint` holds the
    matrices and the updates. `load_weights` sets both factors of an update to zero,
    which gives no gradients: load weights before you enable LoRA.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))
    kcm.enable_lora(model, rank=4, text=True)
    model.compile(keras.optimizers.AdamW(1e-4))
    ```

    Args:
        model: A `ContrastiveModel`.
        rank: Integer, the rank of the updates.
        image: Boolean. Whether the image encoder gets LoRA.
        text: Boolean. Whether the text encoder gets LoRA.
        layer_names: List of strings, the names of the layers that get LoRA: `Dense`,
            `EinsumDense` or `Embedding` layers. By default the query and value
            projections of all families of keras_hub.

    Raises:
        ValueError: If an encoder has LoRA already, or no layer of these names.

    Reference:
        - [LoRA: Low-Rank Adaptation of Large Language Models](
          https://arxiv.org/abs/2106.09685)
    """
    check_integer("rank", rank)
    encoders = model.image_encoder, model.text_encoder
    targets = []
    for encoder, name, has_lora in zip(encoders, ("image", "text"), (image, text)):
        check_no_lora("model", encoder)
        if has_lora:
            targets += _find_lora_layers(encoder, name, layer_names)
    for encoder in encoders:
        _freeze_weights(encoder, len(encoder.weights))
    for layer in targets:
        layer.enable_lora(rank)
    model.compiled = False
    # The compiled predictions of TensorFlow would not see the updates.
    for name in ("image_tower", "text_tower"):
        vars(model).pop(name, None)


def _start_of_last_blocks(encoder, name, count):
    """Returns the index in `encoder.weights` at which the last blocks begin."""
    check_integer(name, count, 0)
    check_no_lora("model", encoder)
    # Keras lists weights in the order of the graph, but nested layers in another one.
    places = {id(weight): i for i, weight in enumerate(encoder.weights)}
    starts = sorted(
        min(places[id(weight)] for weight in layer.weights)
        for layer in all_layers(encoder)
        if type(layer).__name__ in BLOCKS
    )
    if count > len(starts):
        raise ValueError(
            f"`{name}` must not exceed the number of keras_hub's transformer blocks in "
            f"the {name} encoder, {len(starts)}. To train a part of another encoder, "
            "set `trainable` of its layers. "
            f"Received: {name}={count}, encoder={encoder.name}"
        )
    return [*starts, len(places)][len(starts) - count]


def _freeze_weights(encoder, count):
    """Freezes the first weights of an encoder, and trains the rest."""
    encoder.trainable = True
    trained, _ = weights_by_layers(encoder)
    for index, weight in enumerate(encoder.weights):
        # On TensorFlow, layers do not train a weight again that was frozen by itself.
        if id(weight) in trained:
            weight.trainable = index >= count


def _find_lora_layers(encoder, name, layer_names):
    layers = [
        layer
        for layer in all_layers(encoder)
        if hasattr(layer, "enable_lora") and not isinstance(layer, keras.Model)
    ]
    names = [layer_names] if isinstance(layer_names, str) else [*layer_names]
    found = [layer for layer in layers if layer.name in names]
    is_default = layer_names is LORA_LAYERS
    if not found or not (is_default or {*names} == {layer.name for layer in found}):
        raise ValueError(
            f"`layer_names` must name layers of the {name} encoder that can have LoRA, "
            f"which are {sorted({layer.name for layer in layers})}. "
            f"Received: layer_names={layer_names}, encoder={encoder.name}"
        )
    return found
