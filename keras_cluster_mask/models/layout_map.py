import keras

from keras_cluster_mask.checks import check_choice

# The first matrix of an attention or MLP is sharded over its outputs (heads, hidden
# units), the last one over its inputs. Each attention or MLP then needs one all-reduce.
# SigLIP's layers have other names than those of CLIP and MetaCLIP 2.
LAYOUTS = {
    r"(attention|self_attn)/(query|key|value)/kernel": (None, "model", None),
    r"(attention|self_attn)/(query|key|value)/bias": ("model", None),
    r"(attention|self_attn)/attention_output/kernel": ("model", None, None),
    r"(dense_1|mlp/fc1)/kernel": (None, "model"),
    r"(dense_1|mlp/fc1)/bias": ("model",),
    r"(dense_2|mlp/fc2)/kernel": ("model", None),
}


def clip_layout_map(
    device_mesh: keras.distribution.DeviceMesh, axis: str = "model"
) -> keras.distribution.LayoutMap:
    """Makes a layout map that shards the weights of a CLIP or SigLIP over devices.

    Use it for models that do not fit on one device (tensor parallelism). The attention
    heads and hidden units in the blocks of both towers, and in SigLIP's pooling, are
    sharded over the devices along one axis of the mesh. All other weights, which are
    few, are replicated. Works on JAX, the only backend where Keras has `ModelParallel`.
    Make the model after you set the distribution.

    Example:

    ```python
    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh(
            (1, len(devices)), ["batch", "model"], devices
        )
        distribution = keras.distribution.ModelParallel(
            layout_map=kcm.models.clip_layout_map(mesh),
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )
        with distribution.scope():
            backbone = kcm.models.clip_backbone("tiny", 32, vocabulary_size=100)
            model = kcm.ContrastiveModel.from_backbone(backbone)
    ```

    Args:
        device_mesh: A `keras.distribution.DeviceMesh`. The number of heads of both
            towers must be divisible by its devices along `axis`.
        axis: String. The axis of the mesh along which the weights are sharded.

    Returns:
        A `keras.distribution.LayoutMap` for a keras_hub `CLIPBackbone`,
        `MetaCLIP2Backbone` or `SigLIPBackbone` and the optimizer that trains it.

    Raises:
        ValueError: If the mesh has no such axis.

    Reference:
        - [Megatron-LM](https://arxiv.org/abs/1909.08053), section 3.
    """
    check_choice("axis", axis, tuple(device_mesh.axis_names))
    layouts = keras.distribution.LayoutMap(device_mesh)
    for path, layout in LAYOUTS.items():
        named = tuple(axis if each == "model" else each for each in layout)
        # The path begins with the encoder's name, which may be any.
        layouts[rf".*encoder_(block_\d+|head)/{path}"] = named
    return layouts
