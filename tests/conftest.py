"""Settings of the whole test suite: one thread, no network, the same examples in every run."""

import gc
import os
import shutil
import sys
import tempfile

# Before anything imports torch. Setting them here costs tests that need no torch nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The command sets it for several processes before it imports torch; the tests' processes are forked
# from one server, which has imported it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# trackio reads its folder when it is imported, and any test may be the first that imports it. A
# folder set by one test would be too late, and runs of tests would reach the user's own folder.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="molf-tests-trackio-")

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "molf",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(  # to learn only whether a test fails (scripts/planted_faults.py)
    "no-shrink", settings.get_profile("molf"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("molf")


def pytest_unconfigure() -> None:
    """Remove the folder of trackio's runs."""
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first; skip tests marked `gpu` where there is no CUDA device."""
    # Short files come last, so that no worker ends long after the other.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep imported modules out of garbage collections, which take half of a tiny training."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


_frozen = 0  # modules at the last freeze
