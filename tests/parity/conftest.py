"""Set-up of the parity suite: quiet PaddleNLP, one thread for tiny models, and the final count."""

from __future__ import annotations

import os

# Before Paddle, whose bundled zlib otherwise breaks later imports; and thread counts before the
# run-time libraries that read them: on models this small a second thread only waits.
import zlib  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("FASTGEN_NUM_THREADS", "1")

import importlib.util
import platform
import warnings
from pathlib import Path

import pytest

from fastgen.testing import profiles
from fastgen.testing.margins import MARGIN_USES_ALLOWED, ParityLog

HAS_PADDLENLP = importlib.util.find_spec("paddlenlp") is not None

_LOG = pytest.StashKey[ParityLog]()
_PROFILE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOG] = ParityLog()
    config.stash[_PROFILE] = profiles.choose(config.getoption("--hypothesis-profile", None))
    if HAS_PADDLENLP:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from paddlenlp.utils.log import logger
        logger.set_level("ERROR")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.parity)
        # The profiles bound the time; an hour of examples is no hang.
        item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def parity_log(pytestconfig: pytest.Config) -> ParityLog:
    """Where the tests count what they compared."""
    return pytestconfig.stash[_LOG]


def pytest_sessionfinish(session: pytest.Session) -> None:
    log = session.config.stash[_LOG]
    if log.too_many_margin_uses and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    report = os.environ.get("FASTGEN_PARITY_REPORT")
    if report and log.tests:
        log.write(Path(report), profile=session.config.stash[_PROFILE], **_versions())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    log = config.stash[_LOG]
    if not log.tests:
        return
    terminalreporter.section("parity with PaddleNLP")
    versions = ", ".join(f"{name} {value}" for name, value in _versions().items())
    terminalreporter.write_line(f"profile {config.stash[_PROFILE]}; {versions}")
    terminalreporter.write_line(log.summary())
    if log.too_many_margin_uses:
        terminalreporter.write_line(
            f"FAILED: {100 * log.margin_share:.2f} % of the sequences needed the margin rule, "
            f"{100 * MARGIN_USES_ALLOWED:g} % are allowed",
            red=True,
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    if HAS_PADDLENLP:
        import paddle
        import paddlenlp

        versions["paddle"] = paddle.__version__
        versions["paddlenlp"] = paddlenlp.__version__
    return versions
