import numpy as np
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking.batch_part import current_part, part_of_batch


def test_a_part_of_a_batch_is_masked_as_the_whole_would_be():
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype("float32")
    whole, _ = kcm.ClusterMasking(4, seed=1).select(images)
    masking = kcm.ClusterMasking(4, seed=1)
    with part_of_batch(6, lambda noise: noise[2:5]):
        part, _ = masking.select(images[2:5])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(part), ops.convert_to_numpy(whole)[2:5]
    )


def test_a_part_ends_with_its_block_even_after_an_error():
    try:
        with part_of_batch(6, lambda noise: noise):
            assert current_part()[0] == 6
            raise RuntimeError
    except RuntimeError:
        pass
    assert current_part() is None
