"""Read by pytest before the tests of this folder."""

from tests.models.conftest import seeded  # noqa: F401
