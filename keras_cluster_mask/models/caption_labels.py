import numpy as np
from keras import ops


def caption_labels(token_ids):
    """Two numbers per caption that are equal for equal captions.

    A fingerprint of 64 bits: pairs of captions are compared many millions at a time,
    too many to do so token by token. Among 32,768 different captions, two share theirs
    with a probability of 3e-11.

    Args:
        token_ids: `(batch, T)` int tensor.

    Returns:
        `(batch, 2)` int32 tensor.
    """
    token_ids = ops.cast(token_ids, "int32")
    position = ops.arange(ops.shape(token_ids)[1], dtype="int32")
    # Every token at every place is given a random-looking number; their sum does not
    # know the order of the places any more, which the numbers themselves do.
    placed = token_ids + _int32(0x9E3779B1) * position
    return ops.stack(
        [
            ops.sum(_scramble(ops.bitwise_xor(placed, _int32(key))), axis=1)
            for key in (0x243F6A88, 0x85A308D3)
        ],
        axis=1,
    )


def _scramble(x):
    # The finaliser of MurmurHash3 (https://github.com/aappleby/smhasher): each bit of
    # the input changes half the bits of the output. Products wrap around on purpose.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ops.bitwise_xor(x, ops.bitwise_right_shift(x, _int32(shift)))
        x = x * _int32(factor)
    return x


def _int32(number):
    return int(np.array(number, "uint32").astype("int32"))
