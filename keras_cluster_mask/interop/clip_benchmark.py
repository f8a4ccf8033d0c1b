"""Evaluation by clip_benchmark, which evaluates open_clip's models.

Its metrics, datasets, class names and templates evaluate a Keras model, on any
backend:

```bash
pip install clip-benchmark
python -m keras_cluster_mask.interop.clip_benchmark eval \\
    --model ViT-B-16 --pretrained model.keras \\
    --dataset wds/flowers --dataset_root flowers --output flowers.json
```

All commands and options are clip_benchmark's own. These differ:

- `--pretrained` is a file that `model.save` wrote, or the folder of a keras_hub preset.
  `--model` is any name, which is written into the results.
- `--tokenizer` is a file that `CLIPTokenizer.save` wrote; by default the tokenizer is
  CLIP's.
- `--resize` is `crop` by default: images are resized and cropped as for CLIP. Give
  `--resize squash` for SigLIP: the whole image is resized.
- `--model_type` is `keras` by default. Give `--model_type open_clip` to evaluate
  open_clip's models the same way. These have their own tokenizer and their own way to
  resize images: `--tokenizer` and `--resize` are refused.
- `--no_amp` is always on. A Keras model computes in the precision of its own dtype
  policy, and half precision would only round the scores of classes.
- `--num_workers` is 0 by default. Workers are forked, and a forked process can wait
  forever for a lock that a thread of JAX or TensorFlow holds. Spawned workers are
  impossible, as clip_benchmark's pipelines cannot be pickled. On torch, more workers
  are safe.

On a GPU set `TF_FORCE_GPU_ALLOW_GROWTH=true` for TensorFlow, which otherwise takes all
memory of the GPU: clip_benchmark's own tensors are torch's and need some too.

SugarCrepe, the choice between a caption and a wrong one that differs in a word or two,
is seven datasets, `sugar_crepe/swap_att` and so on; `sugar_crepe` is all of them:

```bash
python -m keras_cluster_mask.interop.clip_benchmark eval \\
    --model ViT-B-16 --pretrained model.keras \\
    --dataset sugar_crepe --dataset_root sugarcrepe --output "{dataset}.json"
```

The folder `sugarcrepe` holds the JSON files of the authors (`swap_att.json`) and the
images of COCO's validation split (`val2017/`); clip_benchmark downloads what is
missing. The accuracy is `acc`. It equals
`kcm.evaluation.caption_selection_accuracy`, except that two captions with exactly equal
similarities count as right there and as wrong here.

A dataset of your own is a folder of WebDataset shards, passed as `wds/` and any name:

- `test/0.tar`, `test/1.tar` and so on, with their number in `test/nshards.txt`;
- for classification, samples of `KEY.jpg` (or png, webp) and `KEY.cls`, the number of
  the class; one class a line in `classnames.txt`, and one template a line, such as
  `a photo of a {c}.`, in `zeroshot_classification_templates.txt`;
- for retrieval, samples of `KEY.jpg` and `KEY.txt`, one caption a line, and the word
  `retrieval` in `dataset_type.txt`. Pass `--task zeroshot_retrieval`.

Reference:
    - [CLIP benchmark](https://github.com/LAION-AI/CLIP_benchmark)
"""

import argparse
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

from keras_cluster_mask.evaluation.embedding import Embedder
from keras_cluster_mask.evaluation.preprocessing import (
    check_resize,
    load_tokenizer,
    resize_image,
)
from keras_cluster_mask.masking.patch_grid import is_channels_first
from keras_cluster_mask.models import ContrastiveModel
from keras_cluster_mask.models.encoders import data_format_of
from keras_cluster_mask.models.loading import as_contrastive_model, image_size_of
from keras_cluster_mask.training.tokens import check_tokenizer
from keras_cluster_mask.types import Tensor

# torch is imported in functions only: `adapt` says what to install without it.

MODEL_TYPE = "keras"
# Put before the user's options, of which the last one of a kind counts.
DEFAULTS = "--model_type", MODEL_TYPE, "--no_amp", "--num_workers", "0"


def adapt(
    model: Any,
    tokenizer: Callable | str | os.PathLike | None = None,
    resize: str = "crop",
) -> tuple["Adapter", Callable, Callable]:
    """Makes what clip_benchmark needs to evaluate a model.

    The three results can be passed to any of clip_benchmark's metrics, and to other
    evaluations that are written for open_clip's models. Accuracies of clip_benchmark
    need `repaired` on NumPy 2.4 and later.

    Example:

    ```python
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    backbone = kcm.models.clip_backbone("tiny", image_size=32)
    model, transform, tokenizer = kcm.interop.clip_benchmark.adapt(backbone)
    classes, templates = ["cat", "dog"], ["a photo of a {c}.", "a drawing of a {c}."]
    weights = zero_shot_classifier(model, tokenizer, classes, templates, "cpu")
    weights.shape  # (96, 2)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a file that `save` wrote of one of them or
            of the folder of a keras_hub preset.
        tokenizer: A `CLIPTokenizer`, the path of a file that `CLIPTokenizer.save`
            wrote, a tokenizer of open_clip or Hugging Face, or any function from a list
            of str to `(texts, T)` ids. SigLIP and MetaCLIP 2 need their own. By default
            CLIP's.
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
    check_resize(resize)
    model = as_contrastive_model(model)
    image_shape = model.image_tower.encoder.input.shape[1:]
    context_length = model.context_length
    image_size = image_size_of(model)
    if None in image_size:
        raise ValueError(
            "`model` must have an image encoder that takes images of one size. "
            f"Received: an encoder of images of shape {image_shape}"
        )
    tokenizer = functools.partial(
        _text_ids, tokenizer=load_tokenizer(tokenizer, context_length)
    )
    check_tokenizer(model, lambda texts: tokenizer([x.decode() for x in texts]))
    ids = tokenizer("a photo")
    if context_length not in (None, ids.shape[1]):
        raise ValueError(
            "`tokenizer` must return ids of the length that the model's text encoder "
            f"takes, {context_length}. Received: ids of shape {tuple(ids.shape)}"
        )
    transform = functools.partial(_pixels, image_size=image_size, resize=resize)
    return Adapter(model), transform, tokenizer


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Lets clip_benchmark compute accuracies with NumPy 2.4 and later.

    clip_benchmark takes arrays of one element for numbers, which NumPy has come to
    refuse. It is changed within the context only. The command needs no context.

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
    before = vars(metrics).get("float", float)
    metrics.float = lambda x: float(x.item() if hasattr(x, "item") else x)
    try:
        yield
    finally:
        metrics.float = before
        if before is float:
            del metrics.float


class Adapter:
    """A `ContrastiveModel` that takes and returns torch tensors, as open_clip's do.

    It embeds by Keras's compiled inference, without gradients, and in the precision of
    the model's dtype policy: `torch.autocast` has no influence.

    Args:
        model: A `ContrastiveModel`.
    """

    def __init__(self, model: ContrastiveModel):
        self._embedder = Embedder(model)
        self._channels_first = is_channels_first(data_format_of(model.image_encoder))

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
        if not self._channels_first:
            images = images.permute(0, 2, 3, 1)
        return _embedded(self._embedder.images, images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor.

        Returns:
            `(batch, d)` float32 tensor on the same device, L2-normalized.
        """
        return _embedded(self._embedder.texts, token_ids.int())

    def eval(self) -> Self:
        """Returns itself: it is for inference only."""
        return self

    def to(self, device: Any) -> Self:
        """Returns itself: Keras has placed the model already.

        Args:
            device: Ignored.
        """
        return self


def main(arguments: list[str] | None = None) -> int:
    """Runs a command of clip_benchmark's, for Keras models by default.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0, or 2 for an error.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokenizer")
    parser.add_argument("--resize")
    options, theirs = parser.parse_known_args(arguments)
    if theirs[:1] == ["eval"]:
        theirs[1:1] = DEFAULTS
    if {"-h", "--help"} & set(theirs):
        print(__doc__)
    program = "clip_benchmark"
    given = sys.argv
    try:
        _check_effect(options, theirs)
        with _registered(**vars(options)), repaired():
            # It takes its options from there alone.
            sys.argv = [program, *theirs]
            _import("clip_benchmark.cli").main()
    except (ValueError, OSError, ImportError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        sys.argv = given
    return 0


def _check_effect(options, theirs):
    """Checks that options of this module alone are not given for other models."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_type")
    kind = parser.parse_known_args(theirs)[0].model_type
    if theirs[:1] == ["eval"] and kind == MODEL_TYPE:
        return
    for name, value in vars(options).items():
        if value is not None:
            raise ValueError(
                f"`--{name}` is only for `eval` with `--model_type {MODEL_TYPE}`. "
                "Leave it out: other models have their own. "
                f"Received: --{name}={value!r}, with {' '.join(theirs)}"
            )


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


def _text_ids(texts, tokenizer):
    import torch

    texts = [texts] if isinstance(texts, str) else list(texts)
    return torch.from_numpy(tokenizer(texts)).long()


@contextlib.contextmanager
def _registered(tokenizer, resize):
    """Makes clip_benchmark know the models of this library for a while."""
    models = _import("clip_benchmark.models")

    # It loads the model again for each dataset.
    @functools.lru_cache(maxsize=1)
    def load(model_name, pretrained, cache_dir=None, device="cpu"):
        return adapt(pretrained, tokenizer, "crop" if resize is None else resize)

    models.TYPE2FUNC[MODEL_TYPE] = load
    models.MODEL_TYPES.append(MODEL_TYPE)
    try:
        yield
    finally:
        del models.TYPE2FUNC[MODEL_TYPE]
        models.MODEL_TYPES.remove(MODEL_TYPE)


def _import(name):
    """Imports a module of clip_benchmark's, which brings torch too."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This evaluation is clip_benchmark's, whose module {name} cannot be "
            f"imported ({error}): `pip install clip-benchmark`."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
