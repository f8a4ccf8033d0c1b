"""Floating-point operations of a training step, counted from shapes."""

from keras_cluster_mask.encoders.architecture import architecture_of_size
from keras_cluster_mask.masking.similarity_masking import SimilarityMasking

# Dense bfloat16, from the vendor's data sheets, in TFLOP/s. A name is that which the
# driver gives, since a card of the same chip may be slower: an H100 for PCIe is.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
}


def training_flops(
    size, image_size=224, context_length=77, patch_size=None, masking=None
):
    """Floating-point operations to train a CLIP on one image-text pair.

    A multiplication and an addition count as two. Counted are the matrix products of
    both towers and their projections, three times (forward, and backward to inputs and
    weights), and, once, those by which a masking compares patches with one another. The
    loss, the iterations of
    k-means and of transport, and all that works element by element are left out, a few
    per cent at most. Attention is counted whole, causal attention too, and so are
    tokens that a threshold hides: both are computed. Micro-batches take the towers
    forward a second time, which costs a third more.

    Example:

    ```
    whole = training_flops("vit_b_16")  # 123 billion
    half = training_flops("vit_b_16", masking=kcm.ClusterMasking(0.5, patch_size=16))
    half / whole  # 0.57
    ```

    Args:
        size: As for `clip_backbone`, such as `"vit_b_16"`.
        image_size: Integer. The side of the square images in pixels.
        context_length: Integer. The number of tokens of a text, padding included.
        patch_size: Integer. Defaults to the size's own.
        masking: The `PatchMasking` to train with. `None` reads whole images.

    Returns:
        Integer.

    Raises:
        ValueError: For an unknown size, or if the patch size does not divide the
            image size.
    """
    shape = architecture_of_size(size, image_size, patch_size)
    patches, pixels = (image_size // shape.patch) ** 2, 3 * shape.patch**2
    kept = patches if masking is None else masking.num_kept(patches)
    image_width, image_layers = shape.image_width, shape.image_layers
    text_width = shape.text_width
    forward = (
        2 * patches * pixels * image_width  # All patches are embedded, then some left.
        + flops_of_blocks(1 + kept, image_width, image_layers)
        + flops_of_blocks(context_length, text_width, shape.text_layers)
        + 2 * (image_width + text_width) * shape.projection
    )
    comparing = 0
    if isinstance(masking, SimilarityMasking):
        compared = pixels + (image_width if masking.embedding_weight != 0.0 else 0)
        # Cluster masking compares with anchors, the others all patches with all.
        num_anchors = getattr(masking, "num_anchors", lambda patches: patches)(patches)
        comparing = 2 * num_anchors * patches * compared
    return 3 * forward + comparing


def peak_tflops(accelerator):
    """The peak of a card in dense bfloat16 in TFLOP/s, or `None` if it is not known."""
    return PEAKS.get(accelerator)


def utilization(flops, seconds, peak):
    """The share of a peak in TFLOP/s that so many operations in so long a time are."""
    return flops / seconds / (peak * 1e12)


def flops_of_blocks(tokens, width, layers):
    # Four projections and two layers to four times the width and back; then every token
    # with every other, for the weights of attention and for what they weigh.
    return layers * tokens * (2 * (4 + 8) * width**2 + 2 * 2 * tokens * width)
