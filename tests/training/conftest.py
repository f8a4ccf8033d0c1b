"""Read by pytest before the tests of this folder."""

import pytest

from tests.models.conftest import seeded  # noqa: F401


@pytest.fixture
def model():
    # Keras is imported once the backend is prepared.
    from tests.helpers import compiled_model

    return compiled_model()
