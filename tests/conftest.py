"""What all tests share: the seed of the drills."""

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of the drills; default: another one each time, printed on failure")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """`--seed`, or one that nobody has chosen."""
    chosen = request.config.getoption("--seed")
    return random.randrange(2**32) if chosen is None else int(chosen)
