import keras
import numpy as np
from keras import ops

# Channel statistics that OpenAI trained CLIP with, for values in [0, 1]
# (https://github.com/openai/CLIP, clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images):
    """Scales and normalises uint8 images; leaves others as they are.

    On the device, in the compiled step: uint8 takes a quarter of the memory and
    of the transfer of float32.

    Args:
        images: `(batch, H, W, C)` tensor, or channels first as
            `keras.config.image_data_format()` says.

    Returns:
        A float32 tensor for uint8 images, with CLIP's mean and deviation per
        channel (their averages where there are not three channels); any other
        tensor untouched.
    """
    images = ops.convert_to_tensor(images)
    if keras.backend.standardize_dtype(images.dtype) != "uint8":
        return images
    first = keras.config.image_data_format() == "channels_first"
    mean, std = np.array(CLIP_MEAN, "float32"), np.array(CLIP_STD, "float32")
    if images.shape[1 if first else -1] != 3:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    if first:
        mean, std = mean[:, None, None], std[:, None, None]
    return (ops.cast(images, "float32") / 255.0 - mean) / std
