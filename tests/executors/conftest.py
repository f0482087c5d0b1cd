"""Fixtures that start one Ray and one Spark per test module, because a start takes seconds."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import warnings

import pytest

from tests.command import PYTHONPATH

IN_EVERY_RUN = {
    "test_a_missing_package_is_named_with_its_command[ray-ray]",
    "test_a_missing_package_is_named_with_its_command[spark-pyspark]",
}
"""Tests about Ray or Spark that run without ``make test-engines``. All other tests start an
engine.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        engine = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if engine in {"ray", "spark"} and item.name not in IN_EVERY_RUN:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="module")
def engines():
    """Yield a function that starts an engine by its name, once. All engines stop at the end."""
    stops = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("OMP_NUM_THREADS", "1")

        def start(name: str) -> None:
            require(name)
            if name == "ray" and name not in stops:
                stops[name] = start_ray()
            if name == "spark" and name not in stops:
                stops[name] = start_spark()

        yield start
        for stop in stops.values():
            stop()


def require(name: str) -> None:
    """Skip the test if the engine is not installed."""
    package = {"ray": "ray", "spark": "pyspark"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'vilu[{name}]'")
    if name == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")


def start_ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=2**28,
        )
    return ray.shutdown


def start_spark():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyspark

        settings = {
            "spark.master": "local[2,6]",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "OFF",
            "spark.driver.host": "127.0.0.1",
        }
        context = pyspark.SparkContext(conf=pyspark.SparkConf().setAll(list(settings.items())))
    context.pythonExec = sys.executable
    return context.stop
