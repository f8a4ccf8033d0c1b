"""How long the texts of a batch are, and how padding is cut off on the host."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.distribution.backends import compiles_steps, is_traced
from keras_cluster_mask.encoders.families import TextFamily
from keras_cluster_mask.encoders.masked import random_weights
from keras_cluster_mask.encoders.pooled import PooledEncoder
from keras_cluster_mask.losses import without_padding
from keras_cluster_mask.training.input_rules import MADE
from keras_cluster_mask.training.layers import all_layers

# The smallest length to which texts are cut. JAX and TensorFlow compile a step for each
# length, and captions of 9 to 16 tokens are in nearly all batches.
LEAST = 16 if compiles_steps() else 8
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

    def of(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Returns the number of tokens of each text without the padding at its end.

        Args:
            batch: Dictionary of `(batch, T)` arrays: `"token_ids"`, and the
                `"padding_mask"` if there is one.

        Returns:
            `(batch,)` ints, at least 1.
        """
        names = batch.keys() & {"token_ids", "padding_mask"}
        ids = without_padding(
            self.family, **{name: as_array(batch[name]) for name in names}, xp=np
        )
        ends = np.where(ids >= 0, np.arange(1, ids.shape[1] + 1), 1)
        return ends.max(axis=1, initial=1)

    def cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Cuts the inputs of a text encoder to the longest text, rounded up.

        Args:
            batch: Dictionary of arrays. Other entries than the encoder's inputs are not
                changed.
        """
        found = {name: batch[name] for name in self.names if name in batch}
        shapes = {tuple(np.shape(values)) for values in found.values()}
        if len(shapes) != 1:
            # Nothing is cut, or the encoder will refuse inputs of different shapes.
            return batch
        length = rounded_up(int(self.of(batch).max(initial=1)))
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
        lengths = self.of(batch)
        chunks = np.argsort(lengths, kind="stable").reshape(num_chunks, -1)
        longest = lengths[chunks].max(axis=1)
        return chunks.T.ravel(), [rounded_up(int(length)) for length in longest]

    def cut_on_host(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cuts arrays and lists. Tensors are on a device, and are not changed."""
        if any(map(ops.is_tensor, batch.values())) or is_traced(ops.zeros(())):
            return batch
        return self.cut({name: np.asarray(values) for name, values in batch.items()})


def rounded_up(length: int) -> int:
    """Returns the number of tokens with which texts of a length are encoded.

    On torch a multiple of 4; else one of 16, 24, 32, 48, 64, 96, 128, ..., because each
    is compiled.
    """
    if not compiles_steps():
        return max(LEAST, -(-length // 4) * 4)
    power = 1 << (max(length, LEAST) - 1).bit_length()
    return max(LEAST, power * 3 // 4 if length <= power * 3 // 4 else power)


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
    influence that training brings about.
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
