"""Shared fixtures: one thread a process, one seed, and the schedules built once.

What costs seconds to import is imported by the fixtures and tests that use it: the process that
hands tests out to the others runs this file, too.
"""

from __future__ import annotations

import gc
import html
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import small_studies

if TYPE_CHECKING:
    from fewstep.diffusion.schedules import NoiseSchedule

# Tests run side by side, and small tensors are slower on several threads; for the processes that
# tests start, too. Torch reads this when it is imported.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"


gc.disable()  # until the tests are collected: imports make hardly any garbage

OVER_DIFFUSERS = (
    "tests/adapters/",
    "tests/cli/test_hub_command.py",
    "tests/solvers/test_twins.py",
    "tests/test_docs.py",
    "tests/test_new_users.py",
)
"""Files that import diffusers. Other tests that do, or compile, have the mark ``diffusers``."""


def _is_for_the_first(item: pytest.Item) -> bool:
    """Whether a test imports diffusers or starts the browser."""
    return (
        item.nodeid.startswith(OVER_DIFFUSERS)
        or item.get_closest_marker("diffusers") is not None
        or "browser" in getattr(item, "fixturenames", ())
    )


def _is_another(config: pytest.Config) -> bool:
    """Whether this is not the first of the processes of a run: the first alone imports diffusers.

    It costs a process five seconds, and a browser two. One that is started in place of one that
    crashed has all tests, because it may have to take over for the first.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None or not config.option.loadgroup:
        return False
    return 0 < int(worker["workerid"].removeprefix("gw")) < worker["workercount"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not _is_another(config):
        return None
    path = Path(os.path.relpath(collection_path, config.rootpath)).as_posix()
    return True if f"{path}/".startswith(OVER_DIFFUSERS) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _is_another(config):
        items[:] = [item for item in items if not _is_for_the_first(item)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of one file run in one process; those that the first process alone has run there."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        common: frozenset[str] = frozenset()

        def _check_nodes_have_same_collection(self) -> bool:
            """One process has collected more than the others; its collection is that of the run."""
            collected = self.registered_collections
            largest = max(collected, key=lambda node: len(collected[node]))
            self.registered_collections = {largest: collected[largest], **collected}
            self.common = frozenset.intersection(*map(frozenset, collected.values()))
            return True

        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid) if nodeid in self.common else "diffusers"

        def _assign_work_unit(self, node: Any) -> None:
            """Assigns the next unit that the process has collected."""
            collected = set(self.registered_collections[node])
            for scope, unit in self.workqueue.items():
                if collected.issuperset(unit):
                    self.workqueue.move_to_end(scope, last=False)
                    super()._assign_work_unit(node)
                    return

    return Scheduling(config, log)


def pytest_unconfigure() -> None:
    """Pytest looks for garbage five times at the end, among all modules; once will do."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not walk it again and again."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


class Log(logging.Handler):
    """The last records that were logged during a test.

    One handler of the root for the whole session. The plugin of pytest, which is off, attaches
    two to every logger that does not propagate, for each of a test's three phases: with the
    thousands of loggers of torch and diffusers that is a third of what an empty test costs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[logging.LogRecord] = deque(maxlen=1000)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.kept]

    @property
    def text(self) -> str:
        return "".join(f"{self.format(record)}\n" for record in self.kept)

    def clear(self) -> None:
        self.kept.clear()

    @contextmanager
    def at_level(self, level: int, logger: str) -> Iterator[None]:
        """Lets a logger log from ``level`` on."""
        result = logging.getLogger(logger)
        before = result.level
        result.setLevel(level)
        try:
            yield
        finally:
            result.setLevel(before)


LOG = Log()
logging.getLogger().addHandler(LOG)


@pytest.fixture
def caplog() -> Log:
    """What was logged so far in this test."""
    return LOG


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """A test that fails shows its log, too."""
    if call.excinfo is not None and LOG.kept:
        item.add_report_section(call.when, "log", LOG.text)


@pytest.fixture(scope="session", autouse=True)
def _small_convolutions() -> None:
    """Of a few small images oneDNN takes three times as long as the plain convolution."""
    import torch

    torch._C._set_mkldnn_enabled(False)


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    """Small tensors are slower on several threads; and what fails should fail again."""
    import torch

    LOG.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch.manual_seed formats the stack for every kind of accelerator: 1 ms a test.
    torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vp() -> NoiseSchedule:
    from fewstep.diffusion.schedules import schedule

    return schedule("vp-linear")


@pytest.fixture(scope="session")
def ddpm() -> NoiseSchedule:
    from fewstep.diffusion.schedules import schedule

    return schedule("ddpm-linear")


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty figures: drawing is most of what a small page costs.

    Tests marked ``drawn`` have real ones, and so have the pages of fixtures of a module.
    """
    if request.node.get_closest_marker("drawn") is None:
        empty = '<svg role="img" aria-label="{}"></svg>'
        monkeypatch.setattr(
            "fewstep.reporting.page.svg",
            lambda figure, *, alt, prefix: empty.format(html.escape(alt)),
        )


@pytest.fixture
def few_hypotheses(monkeypatch: pytest.MonkeyPatch) -> None:
    small_studies.few_hypotheses(monkeypatch)


@pytest.fixture
def coarse_references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_studies.coarse_references(monkeypatch)


@pytest.fixture
def few_real_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    small_studies.few_real_samples(monkeypatch)


@pytest.fixture
def quiet_diffusers() -> None:
    """Its logger writes advice to the error stream."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command; returns its message: the error where one was expected, else the output.

    ``said``: the beginnings of lines that may precede an error; ``logged``: whether the log is returned too.
    """
    from fewstep.cli import run

    def inner(
        *arguments: object, code: int = 0, said: tuple[str, ...] = (), logged: bool = False
    ) -> str:
        got = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert got == code, f"exit code {got}\n{out}\n{err}"
        if code == 2:
            # Nothing was done yet: at most the next step was announced.
            assert all(any(start in line for start in said) for line in out.splitlines())
            # So does a stage of progress, which is one line where there is no terminal.
            err = re.sub(r"^[a-z ]+: 0 of \d+\n", "", err)
            assert re.fullmatch(r"error: [^\n]+\n", err), err
            return err
        return err + out if logged else out

    return inner


FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --window-size=390,844"
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser as wide as a phone, with a fresh profile, which logs its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    result, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if result is None or driver_path is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = result
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()
