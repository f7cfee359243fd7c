"""Tests that open a pretended card: left out where PyTorch is too old for one."""

import gc
from pathlib import Path

import pretend_card
import pytest
from sd3_pack.sd3_core.models import fused
from sd3_pack.sd3_core.speed.attention import measured_attention
from tiny import write_tiny_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    reason = pretend_card.why_not()
    if config.getoption("--card"):
        reason = "the session has a card of its own already"
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_known():
    """What the code found out of one card says nothing of the next one under its name."""
    gc.collect()  # whatever an earlier test left in a cycle
    yield
    fused.why_not.cache_clear()
    measured_attention.chosen.clear()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
