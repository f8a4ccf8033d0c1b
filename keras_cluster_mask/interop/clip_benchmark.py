"""Models as clip_benchmark takes them, which evaluates open_clip's models.

Its metrics and datasets evaluate a Keras model, on any backend:

```python
from clip_benchmark.metrics import zeroshot_classification

backbone = kcm.models.clip_backbone("tiny", image_size=32)
model, transform, tokenizer = kcm.interop.clip_benchmark.adapt(backbone)
classes, templates = ["cat", "dog"], ["a photo of a {c}."]
weights = zeroshot_classification.zero_shot_classifier(
    model, tokenizer, classes, templates, "cpu", amp=False
)
weights.shape  # (96, 2)
```

- Pass `amp=False`. A Keras model computes in the precision of its own dtype policy, and
  half precision would only round the scores of classes.
- On JAX and TensorFlow load data without workers (`num_workers=0`). Workers are forked,
  and a forked process can wait forever for a lock that a thread of theirs holds.
- On a GPU set `TF_FORCE_GPU_ALLOW_GROWTH=true` for TensorFlow, which otherwise takes
  all memory: clip_benchmark's own tensors are torch's and need some too.

Reference:
    - [CLIP benchmark](https://github.com/LAION-AI/CLIP_benchmark)
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Self

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.evaluation.embedding import Embedder
from keras_cluster_mask.evaluation.preprocessing import clip_tokenizer, resize_image
from keras_cluster_mask.masking.patch_grid import is_channels_first
from keras_cluster_mask.models.encoders import data_format_of
from keras_cluster_mask.models.loading import image_size_of
from keras_cluster_mask.types import Tensor

# torch is imported in functions only: `adapt` says what to install without it.


def adapt(
    model: Any, tokenizer: Any = None, resize: str = "crop"
) -> tuple["Adapter", Callable, Callable]:
    """Makes what clip_benchmark needs to evaluate a model.

    The three results can be passed to any of clip_benchmark's functions, and to other
    evaluations that are written for open_clip's models. Accuracies of clip_benchmark
    need `repaired` on NumPy 2.4 and later.

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a file that `save` wrote of one of them or
            of the folder of a keras_hub preset.
        tokenizer: See `kcm.evaluation.embed`. SigLIP and MetaCLIP 2 need their own. By
            default CLIP's.
        resize: `"crop"`, as open_clip does for CLIP, or `"squash"`, as it does for
            SigLIP.

    Returns:
        Tuple of an `Adapter`; a function from a `PIL.Image.Image` to a `(3, H, W)`
        uint8 tensor; and a function from a str, or a list of them, to a
        `(texts, T)` int64 tensor of ids.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ImportError: If clip_benchmark is not installed.
        ValueError: For another model or file, for another value of `resize`, or if the
            tokenizer is not the model's.
    """
    _import("clip_benchmark")
    check_choice("resize", resize, ("crop", "squash"))
    adapter = Adapter(model)
    model = adapter.embedder.model
    image_size = image_size_of(model)
    if None in image_size:
        raise ValueError(
            "`model` must have an image encoder that takes images of one size. "
            f"Received: an encoder of images of {image_size}"
        )
    if tokenizer is None:
        tokenizer = clip_tokenizer(model.context_length)
    tokenize = adapter.embedder.tokenizer(tokenizer)
    return (
        adapter,
        functools.partial(_pixels, image_size=image_size, resize=resize),
        functools.partial(_text_ids, tokenize=tokenize),
    )


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Lets clip_benchmark compute accuracies with NumPy 2.4 and later.

    clip_benchmark takes arrays of one element for numbers, which NumPy has come to
    refuse. It is changed within the context only.

    Example:

    ```python
    import torch
    from clip_benchmark.metrics.zeroshot_classification import accuracy

    scores, labels = torch.eye(3), torch.tensor([0, 1, 0])
    with kcm.interop.clip_benchmark.repaired():
        accuracy(scores, labels)  # [0.67]
    ```
    """
    metrics = _import("clip_benchmark.metrics.zeroshot_classification")
    metrics.float = lambda x: float(x.item() if hasattr(x, "item") else x)
    try:
        yield
    finally:
        del metrics.float


class Adapter:
    """A `ContrastiveModel` that takes and returns torch tensors, as open_clip's do.

    It embeds by Keras's compiled inference, without gradients, and in the precision of
    the model's dtype policy: `torch.autocast` has no influence.

    Args:
        model: What `adapt` takes.
    """

    def __init__(self, model: Any):
        self.embedder = Embedder(model)
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
        """Returns itself: it is for inference only."""
        return self

    def to(self, device: Any) -> Self:
        """Returns itself: Keras has placed the model already.

        Args:
            device: Ignored.
        """
        return self


def _embedded(embed, inputs):
    import torch

    # On torch, Keras's own layers would be rounded.
    with torch.autocast(inputs.device.type, enabled=False):
        embeddings = embed(inputs.detach().cpu().numpy())
    return torch.tensor(embeddings, device=inputs.device)


def _pixels(image, image_size, resize):
    import torch

    # uint8 takes a quarter of the memory. The model normalizes on the device, by the
    # statistics that it was trained with.
    pixels = torch.from_numpy(resize_image(image, image_size, resize))
    return pixels.permute(2, 0, 1).contiguous()


def _text_ids(texts, tokenize):
    import torch

    texts = [texts] if isinstance(texts, str) else texts
    return torch.from_numpy(tokenize([text.encode() for text in texts])).long()


def _import(name):
    """Imports a module of clip_benchmark's, which brings torch too."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This evaluation is clip_benchmark's, whose module {name} cannot be "
            f"imported ({error}): `pip install clip-benchmark`."
        ) from error
