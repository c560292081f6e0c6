"""Fixtures and rules for all tests.

Tests marked `netns` are skipped, with the reason, where namespaces or TUN devices cannot be had.
With FASTTUN_NO_SKIP=1 in the environment every skip is a failure: for runs that must prove everything.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings
from support import netns

NO_SKIP = os.environ.get("FASTTUN_NO_SKIP", "") not in ("", "0")

settings.register_profile("fasttun", deadline=None, print_blob=True)
settings.load_profile("fasttun")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("netns")]
    reason = netns.missing() if marked else ""
    if marked and not reason:
        netns.sweep()
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason} (FASTTUN_NO_SKIP=1: a skip is a failure)"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(autouse=True, scope="session")
def _own_runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No control socket of a test's tunnel among this machine's own."""
    before = os.environ.get("FASTTUN_RUNTIME_DIR")
    os.environ["FASTTUN_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))
    yield
    if before is None:
        del os.environ["FASTTUN_RUNTIME_DIR"]
    else:
        os.environ["FASTTUN_RUNTIME_DIR"] = before


@pytest.fixture
def lab() -> Iterator[netns.Lab]:
    """A `support.netns.Lab`, empty; everything made in it is removed after the test."""
    with netns.Lab() as lab:
        yield lab
