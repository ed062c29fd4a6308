"""One thread for all tests of this folder."""

import pytest


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass
