"""Zero-shot classification: images against the names of classes."""

import collections
import warnings
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np

from keras_cluster_mask.evaluation.embedding import (
    embed_batches,
    embed_texts,
    embedder_of,
)
from keras_cluster_mask.evaluation.inputs import (
    check_ks,
    check_labels,
    check_matrix,
    read_labeled,
)
from keras_cluster_mask.models.loading import AnyModel
from keras_cluster_mask.types import EvaluationData, Templates, Tokenizer

TEMPLATES = ("a photo of a {}.",)


def classification_accuracy(
    scores: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    ks: int | Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Computes how often the right class is among the k highest scores.

    If classes have equal scores, the first ranks ahead, as with `argmax`.

    Example:

    ```python
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.1, 0.4], [0.1, 0.8, 0.3]])
    kcm.evaluation.classification_accuracy(scores, [0, 0, 1], ks=(1, 2))
    # {"top_1": 0.67, "top_2": 1.0, "mean_per_class": 0.75}
    ```

    Args:
        scores: `(items, classes)` array: similarities, logits or probabilities.
        labels: `(items,)` ints, the right class of each item.
        ks: Integer or integers. A k of at least the number of classes is skipped,
            because its accuracy is always 1.

    Returns:
        A dictionary of floats in `[0, 1]`: `"top_k"` for each k, and
        `"mean_per_class"`, the top-1 accuracy of each class, averaged over the classes
        that occur.

    Raises:
        ValueError: For scores that are not finite, and for labels out of range.
    """
    ks = check_ks(ks)
    scores = check_matrix("scores", scores, "float64")
    num_classes = scores.shape[1]
    labels = check_labels("labels", labels, len(scores), num_classes)
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    is_ahead = np.arange(num_classes) < labels[:, None]
    is_ahead = (scores > right) | (scores == right) & is_ahead
    ranks = np.count_nonzero(is_ahead, axis=1)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    hits = np.bincount(classes, ranks == 0)
    return {
        **{f"top_{k}": float(np.mean(ranks < k)) for k in ks if k < num_classes},
        "mean_per_class": float(np.mean(hits / counts)),
    }


def zero_shot_classifier(
    model: AnyModel,
    class_names: Sequence[str],
    tokenizer: Tokenizer | None = None,
    templates: Templates = TEMPLATES,
    verbose: str | int = "auto",
) -> np.ndarray:
    """Computes the weights of a linear classifier from the names of classes.

    The scores of the classes are `image_embeddings @ weights`. The name of each class
    is inserted in all templates; the embeddings of these texts are averaged and
    normalized (Radford et al., section 3.1.4).

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a photo of a cat."], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    classifier = kcm.evaluation.zero_shot_classifier(
        backbone, ["cat", "dog"], tokenizer, ["a photo of a {}.", "a drawing of a {}."]
    )
    classifier.shape  # (96, 2)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        class_names: List of str. Duplicates have equal weights, and cause a warning.
        tokenizer: See `embed`. Defaults to the tokenizer of the model.
        templates: A str with one `{}` or `{c}` as the placeholder for the name, a
            function from the name to a text, or a list of these. Or a dictionary from
            each name to a list of texts.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        `(d, classes)` float32 array; its columns are L2-normalized.

    Raises:
        ValueError: For a class without a name or without texts, and for a template
            without a placeholder.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
    """
    prompts = _prompts(class_names, templates)
    weights, columns = _weights(model, prompts, tokenizer, verbose)
    return weights[:, columns]


def evaluate_zero_shot(
    model: AnyModel,
    data: EvaluationData,
    class_names: Sequence[str],
    tokenizer: Tokenizer | None = None,
    templates: Templates = TEMPLATES,
    ks: int | Sequence[int] = (1, 5),
    verbose: str | int = "auto",
) -> dict[str, float]:
    """Computes the accuracy of zero-shot classification.

    The metrics match clip_benchmark. If classes have the same name, such as the two
    cranes of ImageNet, only the first is predicted: images of the others count as wrong
    in top-1, and as right in top-5 if their class is among the five.

    Example:

    ```python
    names = ["cat", "dog", "fox"]
    tokenizer = kcm.data.CLIPTokenizer.train(names, 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    images = np.random.randint(0, 256, (12, 32, 32, 3)).astype("uint8")
    labels = np.arange(12) % 3
    kcm.evaluation.evaluate_zero_shot(backbone, (images, labels), names, tokenizer)
    # {"top_1": 0.33, "mean_per_class": 0.33}
    ```

    Images in a folder for each class:

    ```
    names = ["cat", "dog", "fox"]
    data = kcm.data.image_text_dataset(
        "animals", model, training=False, label_key="folder", class_names=names
    )
    kcm.evaluation.evaluate_zero_shot(model, data, names)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        data: See `embed`. Batches hold `"images"` and `"labels"`, indices into
            `class_names`.
        class_names: List of str, the name of each class. For an `image_text_dataset`,
            pass its `class_names`: case may differ, spaces may replace "_" and "-", and
            more classes may follow. Or pass as many other names, as for the folders of
            ImageNet. To change some names, pass a dictionary as `templates`.
        tokenizer: See `embed`. Defaults to the tokenizer of the model.
        templates: See `zero_shot_classifier`.
        ks: See `classification_accuracy`.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        The dictionary of `classification_accuracy`.

    Raises:
        ValueError: In the cases of `zero_shot_classifier`, for data without labels, for
            labels out of range, and for an `image_text_dataset` with `training=True`,
            with other `class_names` than its labels or than here, or for one of several
            processes.
    """
    ks = check_ks(ks)
    prompts = _prompts(class_names, templates)
    batches = read_labeled(data, class_names)
    embedder = embedder_of(model)
    weights, columns = _weights(embedder, prompts, tokenizer, verbose)
    found = embed_batches(embedder, data, batches, None, verbose)
    # Equal columns are computed once, so that rounding cannot decide between them.
    scores = (found["image_embeddings"] @ weights)[:, columns]
    return classification_accuracy(scores, found["labels"], ks)


def _weights(model, prompts, tokenizer, verbose):
    """Returns the weights of classes with different texts, and each class's column."""
    places = {each: place for place, each in enumerate(dict.fromkeys(prompts))}
    texts = [text for each in places for text in each]
    embeddings = embed_texts(model, texts, tokenizer, verbose)
    starts = np.cumsum([0, *map(len, places)])[:-1]
    sums = np.add.reduceat(embeddings, starts, axis=0)
    return keras.utils.normalize(sums).T, [places[each] for each in prompts]


def _prompts(class_names, templates):
    """Returns the texts of each class, as tuples."""
    names = list(class_names)
    nameless = [x for x in names if not isinstance(x, str) or not x.strip()]
    if nameless or not names or isinstance(class_names, str):
        raise ValueError(
            "`class_names` must be a list of str, one name for each class. Received: "
            f"{nameless[:5] or class_names!r}"
        )
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        warnings.warn(
            f"`class_names` contains {sorted(twice)[:5]} more than once: of several "
            "classes with the same name, only the first is ever predicted.",
            stacklevel=3,
        )
    if isinstance(templates, str) or not isinstance(templates, Iterable):
        templates = [templates]
    # An iterator would be empty after the first class.
    templates = templates if isinstance(templates, Mapping) else [*templates]
    prompts = []
    for name in names:
        if isinstance(templates, Mapping):
            texts = templates.get(name) or ()
            texts = [texts] if isinstance(texts, str) else texts
            texts = tuple(texts) if isinstance(texts, Iterable) else ()
        else:
            texts = tuple(_fill(template, name) for template in templates)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                "`templates` must give at least one text for each class: pass str with "
                "one {} as the placeholder for the name, or functions that return a "
                f"text. Received: {templates!r}, with no text for {name!r}"
            )
        prompts.append(texts)
    return prompts


def _fill(template, name):
    """Returns the text of a template; `None` if it has not one placeholder."""
    if callable(template):
        return template(name)
    if str(template).count("{}") + str(template).count("{c}") != 1:
        return None
    return template.replace("{c}", "{}").replace("{}", name)
