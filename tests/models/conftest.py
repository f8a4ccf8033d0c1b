"""Read by pytest before the tests of this folder."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """The same weights in each run, and the settings of Keras as they were before."""
    import keras

    keras.utils.set_random_seed(0)
    policy, data_format = keras.config.dtype_policy(), keras.config.image_data_format()
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_image_data_format(data_format)
