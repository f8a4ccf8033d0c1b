"""How long the texts of a batch are, and how the padding after them is cut off."""

import bisect
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.distribution.backends import compiles_steps, is_traced
from keras_cluster_mask.encoders.families import TextFamily
from keras_cluster_mask.encoders.hidden_tokens import random_weights
from keras_cluster_mask.encoders.pooled import PooledEncoder
from keras_cluster_mask.losses import without_padding
from keras_cluster_mask.training.input_rules import MADE
from keras_cluster_mask.training.layers import all_layers

# The lengths to which texts are cut. JAX and TensorFlow compile a step for each: 16,
# 24, 32, 48, 64, 96, ... Captions of 9 to 16 tokens are in nearly all batches.
COMPILED = compiles_steps()
STEPS: Sequence[int] = range(8, 2**20, 4)
if COMPILED:
    STEPS = [length << power for power in range(16) for length in (16, 24)]
LEAST = STEPS[0]
# The lengths of the texts in the batch of `_is_exact`.
LENGTHS = (2, 3, 5, LEAST, LEAST)
# The signs of its weights, and the largest change of features by rounding. Padding that
# is zero changes a maximum over tokens only if all tokens are below zero, and a minimum
# only if all are above. Values of one sign lose digits in a normalization.
SIGNS = {np.positive: 1e-5, np.abs: 1e-3, lambda x: -np.abs(x): 1e-3}


@dataclasses.dataclass(frozen=True)
class TextLengths:
    """Measures the texts of a batch, and cuts them to the longest one.

    It holds plain values, because worker processes receive it.

    Attributes:
        family: The `TextFamily` of the encoder.
        names: Tuple of str, the inputs of the encoder that are cut. Empty if the
            features would change: the encoder takes texts of one length, pools the last
            of all tokens (SigLIP), or does not hide padding; or if it has inputs of
            unknown use.
    """

    family: TextFamily
    names: tuple[str, ...] = ()

    def of(self, batch: Mapping[str, Any], xp: types.ModuleType = np) -> Any:
        """Returns the number of tokens of each text without the padding at its end.

        Args:
            batch: Dictionary of `(batch, T)` arrays: `"token_ids"`, and the
                `"padding_mask"` if there is one.
            xp: `numpy`, or `tf.experimental.numpy` for tensors in a graph.

        Returns:
            `(batch,)` ints, at least 1.
        """
        names = batch.keys() & {"token_ids", "padding_mask"}
        ids = without_padding(self.family, **{k: batch[k] for k in names}, xp=xp)
        # All tokens up to the last one that is read, of a number unknown to a graph.
        is_inside = xp.cumsum(xp.array(ids >= 0, "int32")[:, ::-1], axis=1) > 0
        return xp.maximum(xp.sum(xp.array(is_inside, "int32"), axis=1), 1)

    def cut(
        self, batch: Mapping[str, Any], xp: types.ModuleType = np
    ) -> Mapping[str, Any]:
        """Cuts the inputs of a text encoder to the longest text, rounded up.

        Args:
            batch: Dictionary of arrays. Other entries than the encoder's inputs are not
                changed.
            xp: As for `of`.
        """
        found = {name: batch[name] for name in self.names if name in batch}
        if len({tuple(values.shape) for values in found.values()}) != 1:
            # Nothing is cut, or the encoder will refuse inputs of different shapes.
            return batch
        if xp is np:
            lengths = self.of({k: ops.convert_to_numpy(x) for k, x in found.items()})
            length = rounded_up(int(lengths.max(initial=1)))
        else:
            longest = xp.max(self.of(found, xp))
            length = xp.min(xp.where(xp.array(STEPS) >= longest, STEPS, STEPS[-1]))
        return {**batch, **{name: values[:, :length] for name, values in found.items()}}

    def chunked(self, batch: Mapping[str, Any], num_chunks: int):
        """Orders texts so that each chunk has texts of similar lengths.

        Args:
            batch: As for `of`.
            num_chunks: Integer. Chunk `i` of `n` consists of the rows `i, i + n, ...`.

        Returns:
            A tuple: `(batch,)` ints, the order of the rows; and for each chunk the
            length to which its texts are cut.
        """
        lengths = self.of({k: ops.convert_to_numpy(x) for k, x in batch.items()})
        chunks = np.argsort(lengths, kind="stable").reshape(num_chunks, -1)
        longest = lengths[chunks].max(axis=1)
        return chunks.T.ravel(), [rounded_up(int(length)) for length in longest]

    def cut_on_host(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cuts arrays and lists. Tensors are on a device, and are not changed."""
        if any(map(ops.is_tensor, batch.values())) or is_traced(ops.zeros(())):
            return batch
        return self.cut({name: np.asarray(values) for name, values in batch.items()})


def rounded_up(length: int) -> int:
    """Returns the number of tokens with which texts of a length are encoded."""
    return STEPS[bisect.bisect_left(STEPS, length)]


def cut_texts(function: Callable, tower: Any) -> Callable:
    """Wraps a train, test or predict function of Keras, so that it gets shorter texts.

    Only on torch, where no step is compiled for the length of texts. The batches are
    still in the memory of the host, so that reading the lengths does not wait for a
    device.

    Args:
        function: Function from a list of batches to logs or outputs.
        tower: A `TextTower`.
    """
    if COMPILED:
        return function

    def cut(batch):
        inputs, *rest = keras.utils.unpack_x_y_sample_weight(batch)
        if isinstance(inputs, dict) and "token_ids" in inputs:
            batch = tower.lengths.cut(inputs), *rest
        return batch

    return functools.wraps(function)(lambda data: function([*map(cut, data)]))


def lengths_of_encoder(tower: Any) -> TextLengths:
    """Returns the `TextLengths` of a `TextTower`.

    An encoder that is not of a known family is called on a few texts, to test whether
    padding has an influence.
    """
    family, longest, names = tower.family, tower.context_length, tower.input_names
    # `from_encoders` and `from_backbone` make their encoders of families of the table.
    is_of_table = isinstance(tower.encoder, PooledEncoder)
    is_of_table = is_of_table or hasattr(tower.encoder, "text_family")
    is_cut = (
        tower.takes_any_length
        and {*names} <= {"token_ids", *MADE}
        and family.pooling != "last token"
        and (family.pooling != "all tokens" or "padding_mask" in names)
        and (longest is None or longest > LEAST)
        and (is_of_table or _is_exact(tower))
    )
    return TextLengths(family, names if is_cut else ())


def _is_exact(tower):
    """Returns whether an encoder returns equal features for texts cut to two lengths.

    The weights are random, with each of `SIGNS`: a weight of zero would hide an
    influence that appears during training.
    """
    family, encoder = tower.family, tower.encoder
    layers = all_layers(encoder)
    if any(isinstance(x, keras.layers.BatchNormalization) for x in layers):
        # In training, its statistics contain padding.
        return False
    end = 7 if family.end_id is None else family.end_id
    words = [x for x in range(7) if x not in (end, family.padding_id)]
    # The two shortest lengths: an encoder may take only multiples of a block.
    width = rounded_up(LEAST + 1)
    width = min(width, tower.context_length or width)
    ids = np.full((len(LENGTHS), width), family.padding_id, "int32")
    for row, length in zip(ids, LENGTHS):
        row[:length] = np.resize(words, length)
        row[length - 1] = end
    # All tokens of one word have the same sign, whatever a layer makes of it.
    ids[-1, : LEAST - 1] = words[0]
    # Sums of other lengths are rounded differently.
    is_rounded = any(x.compute_dtype != "float32" for x in layers)
    try:
        for signs, tolerance in SIGNS.items():
            with random_weights(encoder, signs):
                full, cut = (
                    ops.convert_to_numpy(ops.cast(tower.features(x), "float32"))
                    for x in (ids, ids[:, :LEAST])
                )
            tolerance = 0.02 if is_rounded else tolerance
            if not np.abs(full - cut).max() <= tolerance * np.abs(full).max():
                return False
    except Exception:
        # The encoder need not take texts of a length that was chosen here.
        return False
    return True
