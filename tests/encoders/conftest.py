from tests.models.conftest import seeded  # noqa: F401
