"""Pages and figures: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from fewstep.metrics import Estimate
from pages import Reader, requests

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fewstep.reporting.figures import Series, line_plot, style_of, svg
from fewstep.reporting.page import MISSING, Cell, Page, estimate_texts, number


def estimate(value, half):
    return Estimate(value, value - half, value + half, 0.95, "test", (3, 3))


def lines(count=3):
    return [
        Series(f"s{i}", [5, 10, 20], [9 / (i + 1), 3, 1], [8 / (i + 1), 2, 0.5], [10, 4, 2])
        for i in range(count)
    ]


def example():
    page = Page("A & B", "of `things`")
    page.heading("First")
    page.paragraph("Text with <b> and `x < y`.")
    page.facts([("NFE 5", "tab3", "by 3 %")])
    page.heading("Second")
    rows = [["b", estimate(12.0, 1.0), 3], ["a", estimate(1.5, 0.1), 1000], ["c", None, 20]]
    page.table("Some numbers", ["name", "FID", "n"], rows, marked=[1])
    page.heading("Third")
    page.figure(line_plot(lines(), x_label="NFE", y_label="FID", log_y=True), "One", alt="a <fig>")
    with page.details("More"):
        page.figure(line_plot(lines(), x_label="NFE", y_label="FID"), "Two", alt="again")
        page.picture(Image.new("RGB", (2, 3), "red"), "Red", alt="red pixels")
    return page


def test_the_file_is_whole_and_names_no_server(tmp_path):
    text = example().write(tmp_path / "sub" / "page.html").read_text()
    read = Reader(text)
    assert read.open == []
    assert len(set(read.ids)) == len(read.ids) > 20  # the two figures share no id
    assert all(link.startswith(("#", "data:")) for link in read.links)
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)
    assert "http" not in text
    assert "@import" not in text
    for used in re.findall(r"url\(([^)]*)\)", text):
        assert used.lstrip("#") in read.ids


def test_the_same_page_twice_is_the_same_file():
    assert example().to_html() == example().to_html()


def test_texts_are_escaped_and_code_is_marked():
    text = example().to_html()
    assert "<title>A &amp; B</title>" in text
    assert "Text with &lt;b&gt; and <code>x &lt; y</code>." in text
    assert 'aria-label="a &lt;fig&gt;"' in text


def test_pictures_and_figures_say_what_they_show():
    read = Reader(example().to_html())
    assert [a["alt"] for tag, a in read.attributes if tag == "img"] == ["red pixels"]
    pictures = [a for tag, a in read.attributes if tag == "svg"]
    assert [a["aria-label"] for a in pictures] == ["a <fig>", "again"]
    assert all(a["role"] == "img" for a in pictures)


def test_tables_have_captions_headers_and_sortable_values():
    text = example().to_html()
    read = Reader(text)
    heads = [a for tag, a in read.attributes if tag == "th"]
    assert [a["scope"] for a in heads] == ["col"] * 3 + ["row"] * 3
    assert "number" not in heads[0].get("class", "")
    assert "number" in heads[1]["class"]
    values = [a.get("data-value") for tag, a in read.attributes if tag == "td"]
    assert values == ["12.0", "3.0", "1.5", "1000.0", None, "20.0"]
    assert "<caption><div>Some numbers</div></caption>" in text
    assert f'<td class="number missing">{MISSING}</td>' in text
    assert '12.0<span class="interval">11.0 … 13.0</span>' in text


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="row 1 has 1 fields for 2 columns"):
        Page("x").table("t", ["a", "b"], [[1, 2], [3]])


def test_headings_of_one_name_have_ids_of_their_own():
    page = Page("x")
    for _ in range(3):
        page.heading("Same name")
    assert Reader(page.to_html()).ids == ["same-name", "same-name-2", "same-name-3"]
    with pytest.raises(ValueError, match="level of a heading is 2 or 3, got 1"):
        page.heading("x", level=1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5678, "1235"),
        (0.00012345, "0.0001234"),
        (1.5e-9, "1.500e\N{MINUS SIGN}9"),
        (-2.0, "\N{MINUS SIGN}2.000"),
        (12345678, "12\N{THIN SPACE}345\N{THIN SPACE}678"),
    ],
)
def test_numbers_as_text(value, text):
    assert number(value) == text


def test_an_interval_says_how_many_digits_make_sense():
    page = Page("x")
    page.table(
        "t", ["a"], [[estimate(123.456, 20.0)], [estimate(123.456, 0.002)], [Cell("z", 1.0)]]
    )
    text = page.to_html()
    assert '123.5<span class="interval">103.5 … 143.5</span>' in text
    assert '123.4560<span class="interval">123.4540 … 123.4580</span>' in text


@pytest.mark.parametrize(
    ("value", "half", "texts"),
    [
        (0.0124, 0.0164, ("0.012", "\N{MINUS SIGN}0.004", "0.029")),
        (0.001, 0.0961, ("0.00", "\N{MINUS SIGN}0.10", "0.10")),
        (0.0, 0.0, ("0", "0", "0")),
        (12345.0, 2000.0, ("12345", "10345", "14345")),
        (2e-9, 1e-9, ("2.000e\N{MINUS SIGN}9", "1.000e\N{MINUS SIGN}9", "3.000e\N{MINUS SIGN}9")),
    ],
)
def test_estimates_as_text(value, half, texts):
    """Two digits of the width, the same number of decimals everywhere, no minus zero."""
    assert estimate_texts(estimate(value, half)) == texts


def test_an_svg_has_the_values_and_follows_the_theme():
    text = svg(line_plot(lines(), x_label="evaluations", y_label="error"), alt="x", prefix="p")
    for word in (">evaluations<", ">error<", ">s0<", ">s2<"):
        assert word in text
    assert "var(--ink)" in text
    assert "var(--line)" in text
    assert not re.search(r"<svg[^>]*\s(width|height)=", text)


def test_bands_that_reach_below_zero_do_not_break_a_logarithmic_axis():
    series = [Series("s", [1, 2, 3], [1.0, 0.5, 0.2], [-1.0, 0.1, 0.1], [2.0, 1.0, 0.3])]
    text = svg(line_plot(series, x_label="x", y_label="y", log_y=True), alt="x", prefix="p")
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()


@pytest.mark.parametrize(
    ("high", "shown"),
    [
        (3.6, ["2", "3"]),
        (16.0, ["2", "3", "5", "7"]),
        (400.0, ["2", "5", "20", "50"]),
        (5000.0, []),
    ],
)
def test_a_logarithmic_axis_has_numbers_that_fit(high, shown):
    series = [Series("s", [1.1, high], [1.0, 2.0])]
    text = svg(line_plot(series, x_label="x", y_label="y", log_x=True), alt="x", prefix="p")
    axis = text[text.index("matplotlib.axis_1") : text.index("matplotlib.axis_2")]
    written = re.findall(r">([\d.]+)</text>", axis)
    small = [word for word in written if word not in ("1", "10", "100")]
    assert [word for word in small if float(word) < 60] == shown


def test_looks_differ():
    assert len({str(style_of(i)) for i in range(224)}) == 224


# In a browser


def test_a_browser_sorts_the_table_and_has_nothing_to_complain_of(browser, tmp_path):
    path = example().write(tmp_path / "page.html")
    list(requests(browser))
    browser.get(path.as_uri())

    def order():
        cells = browser.find_elements("css selector", "tbody tr > :first-child")
        return "".join(cell.text for cell in cells)

    heads = browser.find_elements("css selector", "thead th")
    assert order() == "bac"
    heads[1].find_element("tag name", "button").click()
    assert order() == "abc"  # what is missing stands last
    assert heads[1].get_attribute("aria-sort") == "ascending"
    heads[1].find_element("tag name", "button").click()
    assert order() == "bac"
    heads[2].find_element("tag name", "button").click()
    assert order() == "bca"
    assert heads[1].get_attribute("aria-sort") is None
    heads[0].find_element("tag name", "button").click()
    assert order() == "abc"
    assert browser.get_log("browser") == []
    requested = [
        url for url in requests(browser) if url.startswith(("file:", "http", "ws", "ftp"))
    ]
    assert requested == [path.as_uri()]
    width = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert width <= 0  # nothing sticks out on a phone
