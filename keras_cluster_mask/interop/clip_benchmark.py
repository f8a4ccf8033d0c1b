"""Evaluation by clip_benchmark, which evaluates open_clip's models.

Its metrics, data sets, class names and templates judge a Keras model, on any backend:

```bash
pip install clip-benchmark
python -m keras_cluster_mask.interop.clip_benchmark eval \\
    --model ViT-B-16 --pretrained model.keras \\
    --dataset wds/flowers --dataset_root flowers --output flowers.json
```

All commands and options are clip_benchmark's own, but for these:

- `--pretrained` is a file that `model.save` wrote, or the folder of a keras_hub preset.
  `--model` is any name, which is written into the results.
- `--tokenizer` is a file that `CLIPTokenizer.save` wrote; by default the tokenizer is
  CLIP's.
- `--model_type` is `keras` by default. Give `--model_type open_clip` to evaluate
  open_clip's models likewise.
- `--no_amp` is always on. A Keras model computes in the precision of its own dtype
  policy, so half precision would only round the scores that a class is picked by.
- `--num_workers` is 0 by default. Workers are forked, and JAX and TensorFlow run
  threads whose locks a forked process may wait for without end; to be spawned instead,
  they would have to be sent clip_benchmark's pipelines, which cannot be pickled. On
  torch, more workers are safe.

On a GPU set `TF_FORCE_GPU_ALLOW_GROWTH=true` for TensorFlow, which takes all of its
memory otherwise: clip_benchmark's own tensors are of torch, and there too.

A data set of one's own is a folder of WebDataset shards, called `wds/` and any name:

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
import functools
import importlib
import os
import sys

from keras_cluster_mask.data.tokenizers import CLIPTokenizer
from keras_cluster_mask.interop.torch_adapter import Adapter, Tokenizer, Transform
from keras_cluster_mask.models.loading import as_contrastive_model, image_size_of

MODEL_TYPE = "keras"
# Put before the user's options, of which the last one of a kind counts.
DEFAULTS = "--model_type", MODEL_TYPE, "--no_amp", "--num_workers", "0"


def adapt(model, tokenizer=None):
    """Makes what clip_benchmark needs to evaluate a model.

    The three returned can be passed to any of clip_benchmark's metrics, and to other
    evaluations that are written for open_clip's models.

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
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone` or `SigLIPBackbone`, or
            the path of a file that `save` wrote of one of them or of the folder of a
            keras_hub preset.
        tokenizer: What texts are turned into ids by: a `CLIPTokenizer`, the path of a
            file that `CLIPTokenizer.save` wrote, or any function from a list of str to
            `(texts, T)` ids, which SigLIP needs. By default CLIP's.

    Returns:
        Tuple of an `Adapter`, a `Transform` and a `Tokenizer`.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ImportError: If clip_benchmark is not installed.
        ValueError: For another model or file, or if the tokenizer is not the model's.
    """
    _repair()
    model = as_contrastive_model(model)
    image_shape = model.image_tower.encoder.input.shape[1:]
    context_length = model.text_tower.encoder.input.shape[1]
    image_size = image_size_of(model)
    if None in image_size:
        raise ValueError(
            "`model` must have an image encoder that takes images of one size. "
            f"Received: an encoder of images of shape {image_shape}"
        )
    if tokenizer is None:
        tokenizer = CLIPTokenizer.from_open_clip(context_length or 77)
    elif isinstance(tokenizer, str | os.PathLike):
        tokenizer = CLIPTokenizer.from_file(tokenizer, context_length)
    tokenizer = Tokenizer(tokenizer, context_length, model.vocabulary_size)
    # Of a CLIP tokenizer that is not the model's, any text has an id too high.
    tokenizer("a photo")
    return Adapter(model), Transform(image_size), tokenizer


def main(arguments=None):
    """Runs a command of clip_benchmark's, for Keras models by default.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0, or 2 for an error.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokenizer")
    options, theirs = parser.parse_known_args(arguments)
    if theirs[:1] == ["eval"]:
        theirs[1:1] = DEFAULTS
    if {"-h", "--help"} & set(theirs):
        print(__doc__)
    program = "clip_benchmark"
    given = sys.argv
    try:
        _register(options.tokenizer)
        # It takes its options from there alone.
        sys.argv = [program, *theirs]
        _import("clip_benchmark.cli").main()
    except (ValueError, OSError, ImportError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        sys.argv = given
    return 0


def _register(tokenizer):
    """Makes clip_benchmark know the models of this library."""
    models = _import("clip_benchmark.models")

    # It asks for the model anew for every data set.
    @functools.lru_cache(maxsize=1)
    def adapted(path):
        return adapt(path, tokenizer)

    def load(model_name, pretrained, cache_dir=None, device="cpu"):
        return adapted(pretrained)

    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def _repair():
    """Lets clip_benchmark compute accuracies with NumPy 2.4 and later.

    It takes arrays of one element for numbers, which NumPy has come to refuse.
    """
    metrics = _import("clip_benchmark.metrics.zeroshot_classification")
    metrics.float = lambda x: float(x.item() if hasattr(x, "item") else x)


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
