"""Options and fixtures for all tests."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def pytest_addoption(parser):
    parser.addoption("--weights", type=Path, default=None, help="a folder of trained checkpoints to test on")
    parser.addoption("--slow", action="store_true", help="also run tests that take more than 20 s")


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow, or make slow-test"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here: run make gpu-test on one"))


@pytest.fixture(scope="session")
def weights(request) -> Path:
    """The folder of trained checkpoints; without one, tests on them are skipped, loudly."""
    folder = request.config.getoption("--weights")
    if folder is None or not folder.is_dir():
        pytest.skip("TRAINED CHECKPOINTS NOT TESTED: pass --weights=DIR")
    return folder


@pytest.fixture(autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    try:
        import transformers
    except ImportError:
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
