"""Settings of all tests: strict dtype promotion, no rank promotion, and 64-bit numbers in JAX."""

import itertools
import pathlib
import shutil

import hypothesis
import jax
import pytest
import torch

from parity.run import forget

jax.config.update("jax_num_cpu_devices", 8)
# programs that another worker or an earlier run has compiled are reused
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)  # one thread per worker, because threads would mostly wait for each other
hypothesis.settings.register_profile("tests", max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the doctests of Flax modules as slow, because they compile each layer."""
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name.startswith(("kdjax.nn.", "parity.modules")):
            item.add_marker(pytest.mark.slow)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def float64_in_jax():
    """64-bit numbers for the tests in this folder; doctests run with the settings of a user."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
    if next(_tests) % 200 == 0:
        forget()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile much and compute little: without XLA's optimisations, whose effects other tests check."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def browser(tmp_path):
    """Chromium without access to other hosts, and with a log of its requests."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
