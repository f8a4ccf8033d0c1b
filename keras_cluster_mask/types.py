"""Types used in signatures."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Items(Protocol):
    """An object with a length, whose items have numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


# A tensor of the backend, a NumPy array, or a symbolic Keras tensor. They share no base
# class that a type checker could use.
Tensor = Any

# A function from a list of texts to token ids `(texts, length)`; see
# `image_text_dataset` for the kinds.
Tokenizer = Callable[..., Any]

# Images and captions: a path or several, paths with their weights, or an object with
# samples. See `image_text_dataset`.
AnySource = str | os.PathLike | Mapping[Any, float] | Items

# What a model is trained on: a dictionary of arrays, or batches.
Data = Mapping[str, Any] | Iterable[Mapping[str, Any] | tuple]

# What a model is evaluated on: also arrays, pairs of images and labels, and sources.
EvaluationData = AnySource | Iterable[Any]

# Format strings or functions of a class name, or whole sentences by class name.
Templates = str | Callable | Sequence[str | Callable] | Mapping[str, Sequence[str]]
