"""Evaluates Keras models with clip_benchmark, which is made for open_clip's models.

Its metrics and datasets work with a Keras model, on any backend:

```python
from clip_benchmark.metrics import zeroshot_classification

tokenizer = kcm.data.CLIPTokenizer.train(["a photo of a cat"], 600)
backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
model, transform, tokenize = kcm.interop.clip_benchmark.adapt(backbone, tokenizer)
classes, templates = ["cat", "dog"], ["a photo of a {c}."]
weights = zeroshot_classification.zero_shot_classifier(
    model, tokenize, classes, templates, "cpu", amp=False
)
weights.shape  # (96, 2)
```

- Pass `amp=False`. A Keras model computes in the precision of its dtype policy, and
  half precision would only round the scores of classes.
- On JAX and TensorFlow, load data without workers (`num_workers=0`). Workers are
  forked, and a forked process can wait forever for a lock that one of the backend's
  threads holds.
- On a GPU, set `TF_FORCE_GPU_ALLOW_GROWTH=true` for TensorFlow, which otherwise takes
  all memory: clip_benchmark's own tensors are torch's and need some too.

Reference:
    - [CLIP benchmark](https://github.com/LAION-AI/CLIP_benchmark)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

from keras_cluster_mask.encoders.surgery import data_format_of
from keras_cluster_mask.evaluation import embedding
from keras_cluster_mask.masking.patch_grid import is_channels_first
from keras_cluster_mask.training.tokenizers import tokenizer_of
from keras_cluster_mask.types import Tensor

# torch and clip_benchmark are optional, so they are imported in functions only.


def adapt(model: Any, tokenizer: Any = None) -> tuple["Adapter", Callable, Callable]:
    """Adapts a model, its images and its texts to clip_benchmark.

    The three results can be passed to any of clip_benchmark's functions, and to other
    evaluations that are written for open_clip's models. With NumPy 2.4 and later, the
    accuracies of clip_benchmark need `repaired`.

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one: a file, or the folder of a
            keras_hub preset.
        tokenizer: See `kcm.evaluation.embed`. Defaults to the tokenizer of the model.

    Returns:
        Tuple of an `Adapter`; a function from a `PIL.Image.Image` to a `(3, H, W)`
        uint8 tensor; and a function from a str, or a list of them, to a
        `(texts, T)` int64 tensor of ids.

    Raises:
        ValueError: If there is no model at the path.
        ValueError: For an unsupported model or file, or if the tokenizer does not match
            the model.
    """
    adapter = Adapter(model)
    model = adapter.embedder.model
    image_size = model.preprocessing["image_size"]
    if None in image_size:
        raise ValueError(
            "`model` must have an image encoder that takes images of one size. "
            f"Received: an encoder of images of {image_size}"
        )
    tokenize = tokenizer_of(model, tokenizer)
    return (
        adapter,
        functools.partial(_pixels, image_size=image_size, resize=model.resize),
        functools.partial(_text_ids, tokenize=tokenize),
    )


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Lets clip_benchmark compute accuracies with NumPy 2.4 and later.

    clip_benchmark converts arrays of one element to numbers, which NumPy no longer
    allows. It is patched within the context only.

    Example:

    ```python
    import torch
    from clip_benchmark.metrics.zeroshot_classification import accuracy

    scores, labels = torch.eye(3), torch.tensor([0, 1, 0])
    with kcm.interop.clip_benchmark.repaired():
        accuracy(scores, labels)  # [0.67]
    ```
    """
    from clip_benchmark.metrics import zeroshot_classification as metrics

    metrics.float = lambda x: float(x.item() if hasattr(x, "item") else x)
    try:
        yield
    finally:
        del metrics.float


class Adapter:
    """A `ContrastiveModel` that takes and returns torch tensors, as open_clip's do.

    It embeds with Keras's compiled inference, without gradients, in the precision of
    the model's dtype policy: `torch.autocast` has no influence.

    Args:
        model: A model that `adapt` takes.
    """

    def __init__(self, model: Any):
        self.embedder = embedding.embedder_of(model)
        image_encoder = self.embedder.model.image_encoder
        self.channels_first = is_channels_first(data_format_of(image_encoder))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeds images.

        Args:
            images: `(batch, 3, H, W)` tensor: uint8, or floats that are normalized, as
                open_clip's transforms make them.

        Returns:
            `(batch, d)` float32 tensor on the same device, L2-normalized.
        """
        import torch

        if images.dtype != torch.uint8:
            images = images.float()
        if not self.channels_first:
            images = images.permute(0, 2, 3, 1)
        return _embedded(self.embedder.images, images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor.

        Returns:
            `(batch, d)` float32 tensor on the same device, L2-normalized.
        """
        return _embedded(self.embedder.texts, token_ids.int())

    def eval(self) -> Self:
        """Returns itself, since it is for inference only."""
        return self

    def to(self, device: Any) -> Self:
        """Returns itself, since Keras has already placed the model.

        Args:
            device: Ignored.
        """
        return self


def _embedded(embed, inputs):
    import torch

    # On torch, autocast would round the results of Keras's layers.
    with torch.autocast(inputs.device.type, enabled=False):
        embeddings = embed(inputs.detach().cpu().numpy())
    return torch.tensor(embeddings, device=inputs.device)


def _pixels(image, image_size, resize):
    import torch

    # uint8 takes a quarter of the memory. The model normalizes on the device, with its
    # own mean and deviation.
    pixels = torch.from_numpy(embedding.resize_image(image, image_size, resize))
    return pixels.permute(2, 0, 1).contiguous()


def _text_ids(texts, tokenize):
    import torch

    texts = [texts] if isinstance(texts, str) else texts
    return torch.from_numpy(tokenize([*texts])).long()
