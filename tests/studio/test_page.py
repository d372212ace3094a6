"""The page of the studio in a browser, end to end; ``make test-studio`` runs these."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import fewstep
from pages import requests
from tiny_models import write_tiny

pytestmark = [
    pytest.mark.studio,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nicegui") is None,
        reason="NiceGUI is not installed: the extra studio",
    ),
]

PATIENCE = float(os.environ.get("FEWSTEP_STUDIO_PATIENCE", "120"))
"""The seconds after which something that should appear has not: for a machine that does other work."""

PICTURES = os.environ.get("FEWSTEP_STUDIO_PICTURES")
"""A folder for pictures of the page, to look at."""

WIDE, NARROW = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("studio") / "tiny")


@pytest.fixture(scope="module")
def address(folder):
    """The address of a studio that serves a tiny model."""
    words = [sys.executable, "-X", "faulthandler", "-m", "fewstep.cli", "studio", str(folder)]
    process = subprocess.Popen(
        [*words, "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, line + (process.stderr.read() if process.stderr else "")
    yield found[0]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert errors == ""


class Page:
    """What a user does with the page."""

    def __init__(self, driver, address, size=WIDE, *, dark=False):
        self.driver, self.address = driver, address
        driver.set_script_timeout(PATIENCE)
        self.resize(size)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        list(requests(driver))
        driver.get_log("browser")
        driver.get(address)
        self.ended(1)  # the model is loaded

    def resize(self, size):
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": size[0] < 600}
        )

    def wait(self, condition, what="it"):
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if result := condition():
                    return result
            except WebDriverException:  # an element that is replaced right now
                if time.monotonic() + 1 > end:
                    raise
            time.sleep(0.2)
        raise AssertionError(f"{what} did not happen\n{self.text()}")

    def text(self):
        return self.driver.find_element("tag name", "body").text

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def find(self, script, *arguments):
        """Returns what a script finds: one round trip, where the elements are many."""
        return self.driver.execute_script(f"return {script} ?? null", *arguments)

    def button(self, name, place=0):
        return self.find(
            "[...document.querySelectorAll('button')].filter(b => b.offsetParent && (b.ariaLabel === arguments[0]"
            " || b.innerText.trim().split('\\n').pop() === arguments[0]))[arguments[1]]",
            name,
            place,
        )

    def enabled(self, name, place=0):
        button = self.button(name, place)
        return button is not None and button.get_attribute("disabled") is None

    def click(self, element):
        """Clicks in the middle of the window: at its lower end is the dock."""
        self.find("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, name, place=0):
        self.wait(lambda: self.enabled(name, place), name)
        self.click(self.button(name, place))

    def field(self, label, place=0):
        return self.find(
            "[...document.querySelectorAll('label.q-field')].filter(f => f.offsetParent &&"
            " f.querySelector('.q-field__label')?.innerText === arguments[0])[arguments[1]]?.querySelector('input')",
            label,
            place,
        )

    def type(self, label, text, place=0):
        from selenium.webdriver.common.keys import Keys

        field = self.field(label, place)
        self.click(field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE, text, Keys.TAB)

    def choose(self, label, option, place=0):
        """Chooses from a list, or types a value that is not in it."""
        from selenium.webdriver.common.keys import Keys

        field = self.field(label, place)
        self.click(field)
        if field.get_attribute("readonly") is None and field.get_attribute("role") == "combobox":
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(option)
        self.click(self.wait(lambda: self._option(option), option))

    def _option(self, text):
        return self.find(
            "[...document.querySelectorAll('.q-menu .q-item')].find(e => e.offsetParent && e.innerText.trim() === arguments[0])",
            text,
        )

    def runs(self):
        """The number of runs that have ended."""
        return int(self.find("document.querySelector('.studio')?.dataset.runs") or 0)

    def run(self, button="Run"):
        """Runs to the end."""
        before = self.runs()
        self.press(button)
        self.ended(before + 1)

    def ended(self, count):
        """Waits until so many runs have ended."""
        self.wait(lambda: self.runs() >= count and self.enabled("Run"), "the end")

    def slide(self, key):
        """Presses a key on the slider."""
        from selenium.webdriver.common.action_chains import ActionChains

        script = "const s = document.querySelector('.q-slider'); (s.matches('[tabindex]') ? s : s.querySelector('[tabindex]')).focus()"
        self.driver.execute_script(script)
        ActionChains(self.driver).send_keys(key).perform()

    def numbers(self, place=0):
        """Evaluation, time, distance and seconds of a sampler."""
        return self.find(
            "[...document.querySelectorAll('.sampler')[arguments[0]].querySelectorAll('.numbers > div')].map(e => e.lastElementChild.innerText)",
            place,
        )

    def pictures(self, place=0):
        return self.find(
            "[...document.querySelectorAll('.sampler')[arguments[0]].querySelectorAll('.pictures img')].map(e => e.src)",
            place,
        )

    def alarms(self):
        return self.find(
            "[...document.querySelectorAll('[role=alert]')].filter(e => e.offsetParent).map(e => e.innerText).filter(t => t)"
        )

    def code(self, place=0):
        card = self.all(".sampler")[place]
        toggle = next(
            e
            for e in card.find_elements("css selector", ".q-expansion-item .q-item")
            if "Python" in e.text
        )
        if toggle.get_attribute("aria-expanded") != "true":
            self.click(toggle)
        self.wait(lambda: card.find_elements("css selector", "pre")[1].is_displayed())
        return [pre.text for pre in card.find_elements("css selector", "pre")]

    def wrong(self):
        """Console errors, requests of other hosts, and what sticks out at the side."""
        errors = [entry["message"] for entry in self.driver.get_log("browser")]
        here = urlsplit(self.address).netloc
        urls = (urlsplit(url) for url in requests(self.driver))
        away = [
            url.geturl()
            for url in urls
            if url.scheme in ("http", "https", "ws", "wss", "ftp") and url.netloc != here
        ]
        sticking = self.driver.execute_script(
            "return document.documentElement.scrollWidth - innerWidth"
        )
        return errors, away, max(0, sticking)

    def picture(self, name):
        if PICTURES:
            height = self.driver.execute_script("return document.documentElement.scrollHeight")
            width = self.driver.execute_script("return innerWidth")
            self.resize((width, height))
            time.sleep(0.5)
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


FINE = ([], [], 0)


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def test_choose_run_and_scrub(page, folder):
    page.choose("Solver", "tab3")
    page.type("NFE", "6")
    page.type("Classes", "0,shoe")
    page.type("Seed", "7")
    page.run()
    assert page.alarms() == []
    assert "tab3 · NFE 6" in page.text()
    numbers = page.numbers()
    assert numbers[0] == "6 / 6 ✓"
    assert float(numbers[2]) > 0
    last = page.pictures()
    assert all(len(source) > 200 for source in last)
    from selenium.webdriver.common.keys import Keys

    seen = [last[0]]
    for evaluation in range(10, 5, -1):  # the other sampler has 10, and its sample
        page.slide(Keys.ARROW_LEFT)
        page.wait(lambda e=evaluation: f"evaluation {e} of 10" in page.text())
        seen.append(page.pictures()[0])
    assert page.numbers()[0] == "6 / 6"
    assert page.numbers(1)[0] == "6 / 10"
    assert seen[0] == seen[4] != seen[5]  # of 6 evaluations and the sample, the sixth
    page.slide(Keys.PAGE_DOWN)
    page.wait(lambda: page.numbers()[0] == "1 / 6")
    assert page.all(".drawing svg")
    python, command = page.code()
    assert "solver='tab3', nfe=6, seed=7" in python
    assert command.startswith(f"fewstep sample {folder} --solver tab3 --nfe 6 --seed 7")
    assert page.wrong() == FINE


def test_what_is_wrong_is_a_message_on_the_page(page):
    page.type("Options", "etta=1")
    page.run()
    assert "Unknown option 'etta'" in page.alarms()[0]
    page.type("Options", "")
    page.type("Samples", "99")
    page.press("Run")
    page.wait(lambda: any("from 1 to 16, got 99" in text for text in page.alarms()))
    page.type("Samples", "2")
    page.run()
    assert page.alarms() == []
    assert page.wrong() == FINE


def long_run(page):
    """Begins a run that lasts, of another model, with 16 samples of 900 evaluations."""
    page.choose("Model: a name, or a folder", "fashion")
    page.ended(2)
    assert "10 classes" in page.text()
    page.choose("Solver", "ddim")
    page.type("NFE", "900")
    page.type("Samples", "16")
    page.find("document.querySelector('[role=checkbox]')").click()  # no reference
    page.press("Run")
    page.wait(lambda: "/ 900" in page.numbers()[0], "an evaluation")


def test_a_long_run_is_cancelled_and_the_page_stays_responsive(page):
    long_run(page)
    page.press("light or dark")  # while it samples
    page.wait(lambda: page.all("body.body--dark"))
    page.press("Cancel")
    page.ended(3)
    assert "cancelled" in page.text()
    assert not page.numbers()[0].endswith("✓")
    assert page.wrong() == FINE


def test_one_users_run_does_not_disturb_another(page, browser):
    long_run(page)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Page(browser, page.address)
    other.run()
    assert other.numbers()[0] == "10 / 10 ✓"
    browser.close()
    browser.switch_to.window(first)
    assert page.enabled("Cancel")  # still running, or was: its numbers are its own
    assert "/ 900" in page.numbers()[0]
    page.press("Cancel")
    page.ended(3)


def downloaded(folder, pattern, page):
    return page.wait(lambda: next(iter(sorted(folder.glob(pattern))), None), pattern)


@pytest.fixture
def downloads(browser, tmp_path):
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    return tmp_path


def test_picture_and_recipe_are_saved(page, downloads, folder):
    from PIL import Image

    page.choose("Solver", "dpmpp-2m")
    page.type("NFE", "4")
    page.run()
    page.press("Save recipe")
    file = downloaded(downloads, "recipe-A.json", page)
    model = fewstep.load(folder, device="cpu")
    recipe = fewstep.SamplerRecipe.load(file)
    assert (recipe.name, recipe.nfe) == ("dpmpp-2m", 4)
    assert fewstep.sample(model, 1, recipe=file, class_labels=0).shape == (1, 1, 8, 8)
    page.press("save picture")
    with Image.open(downloaded(downloads, "studio.png", page)) as image:
        assert image.width > 200
    assert page.wrong() == FINE


def test_measuring_a_model(page, downloads):
    page.type("NFE", "3,4", place=2)
    page.type("Trajectories", "8")
    page.run("Measure this model")
    assert page.alarms() == []
    assert page.wait(lambda: page.all("table.table"))
    table = page.all("table.table")[0].text
    assert "NFE 3 NFE 4" in table
    assert "measured" in table
    assert "static default" in table
    page.press("Save profile")
    saved = fewstep.Profile.load(downloaded(downloads, "profile.json", page))
    assert sorted(saved.recommended) == [3, 4]
    page.choose("Kind", "Profile (measured)")
    page.type("NFE", "4")
    page.run()
    assert page.alarms() == []
    assert "profile: " in page.text()
    page.picture("measured")
    assert page.wrong() == FINE


def test_by_keyboard_alone(page, browser):
    """Every control is reached with Tab, in the order of the page, and works with keys."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    def focused():
        return browser.execute_script(
            "const e = document.activeElement; const f = e.closest('label.q-field');"
            "return e.closest('[aria-label]')?.ariaLabel || (f ? f.querySelector('.q-field__label')?.innerText : e.innerText)"
        )

    order = []
    for _ in range(60):
        press(Keys.TAB)
        order.append((focused() or "").strip().splitlines()[-1:] or [""])
        if order[-1] == ["Run"]:
            break
    names = [name for (name,) in order]
    for name in (
        "light or dark",
        "Model: a name, or a folder",
        "Samples",
        "Seed",
        "Kind",
        "NFE",
        "Solver",
        "Grid",
    ):
        assert name in names, names
    assert names[-1] == "Run"
    ring = browser.execute_script("return getComputedStyle(document.activeElement).boxShadow")
    assert ring != "none"
    press(Keys.ENTER)
    page.ended(2)
    assert page.numbers(1)[0] == "10 / 10 ✓"
    for _ in range(10):
        press(Keys.TAB)
        if focused() == "evaluation":
            break
    press(Keys.ARROW_LEFT)
    page.wait(lambda: "evaluation 10 of 10" in page.text())
    assert page.wrong() == FINE


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_desktop_and_phone_light_and_dark(browser, address, size, dark):
    page = Page(browser, address, size, dark=dark)
    for _ in range(2):
        page.press("Add a sampler")
    page.wait(lambda: len(page.all(".sampler")) == 4)
    page.run()
    assert bool(page.all("body.body--dark")) == dark
    assert page.alarms() == []
    ground, ink = browser.execute_script(
        "const s = getComputedStyle(document.body);"
        "return ['--ground', '--ink'].map(name => s.getPropertyValue(name).trim())"
    )
    assert (ground < ink) == dark  # "#12…" and "#ec…", or the other way round
    cards = [card.rect for card in page.all(".sampler")]
    assert len({round(card["x"]) for card in cards}) == (1 if size == NARROW else 4)
    assert page.wrong() == FINE
    page.picture(f"{'phone' if size == NARROW else 'desktop'}-{'dark' if dark else 'light'}")
