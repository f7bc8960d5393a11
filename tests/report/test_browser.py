"""Pages of reports in a real browser: nothing is fetched, search and filters work, a phone fits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.browser import missing, open_page
from support.scripts import DOCS
from test_page import EVIL, document, renamed

from custom_quantizer.report.record import Report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser"),
]

NAMES = ("resnet20", "two_heads")


@contextmanager
def shown(name: str, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    with open_page(DOCS / "reports" / f"{name}.html", width, 900, dark) as browser:
        yield browser
        # Refused by the policy, a script's error, something that was to be fetched: all are logged.
        assert browser.get_log("browser") == []


def names(browser: Any) -> list[str]:
    return list(
        browser.execute_script(
            "return [...document.querySelectorAll('#ops > tbody:not([hidden])')]"
            ".filter(b => b.getBoundingClientRect().height > 0).map(b => b.dataset.name)"
        )
    )


def choose(browser: Any, field: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", field)).select_by_visible_text(value)


def rows(name: str) -> list[dict[str, Any]]:
    return list(document(name)["rows"])


def test_search_and_filters_leave_the_ops_that_fit() -> None:
    with shown("two_heads") as browser:
        everything = [row["node"] for row in rows("two_heads")]
        assert names(browser) == everything
        choose(browser, "kind", "emulated")
        emulated = [row["node"] for row in rows("two_heads") if row["placement"] == "emulated"]
        assert names(browser) == emulated == ["conv2d", "linear", "conv2d_5"]
        counted = f"{len(emulated)} of {len(everything)} ops"
        assert browser.find_element("id", "shown").text == counted
        dim = browser.find_elements("css selector", ".graph .box.dim")
        shown_boxes = browser.find_elements("css selector", ".graph .box[data-op]:not(.dim)")
        assert [box.get_attribute("data-op") for box in shown_boxes] == emulated
        assert len(dim) + len(emulated) == 14
        choose(browser, "kind", "everything")
        choose(browser, "bits", "w4")
        narrow = [r["node"] for r in rows("two_heads") if (r["weight"] or {}).get("bits") == 4]
        assert names(browser) == narrow
        browser.find_element("id", "search").send_keys("DOWN2 conv")
        assert names(browser) == ["conv2d_2", "conv2d_3"]
        browser.find_element("id", "search").send_keys(" nothing")
        assert names(browser) == []


def test_a_box_leads_to_its_op_and_back_from_a_filter() -> None:
    with shown("resnet20") as browser:
        choose(browser, "kind", "float inside")
        box = browser.find_element("css selector", ".graph .box[data-op=conv2d_17]")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        box.click()
        op = browser.find_element("css selector", "#ops tbody[data-name=conv2d_17] details")
        assert op.get_attribute("open") is not None
        assert len(names(browser)) == len(rows("resnet20"))
        top = browser.execute_script("return arguments[0].getBoundingClientRect().top", op)
        assert 0 <= top < 200
        charts = op.find_elements("css selector", "svg.chart")
        assert len(charts) == 2
        assert all(chart.rect["width"] > 250 and chart.rect["height"] > 80 for chart in charts)


def test_columns_sort_and_all_details_open() -> None:
    with shown("two_heads") as browser:
        heading = browser.find_element("xpath", "//table[@id='ops']//th[.='acc']")
        heading.click()
        heading.click()
        bits = {row["node"]: row["accumulator_bits"] for row in rows("two_heads")}
        ordered = [bits[name] or 0 for name in names(browser)]
        assert ordered == sorted(ordered, reverse=True)
        browser.find_element("id", "open").click()
        opened = browser.find_elements("css selector", "#ops details[open]")
        assert len(opened) == len(rows("two_heads"))
        browser.find_element("id", "open").click()
        assert not browser.find_elements("css selector", "#ops details[open]")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_never_scrolls_sideways(name: str, width: int, dark: bool) -> None:
    with shown(name, width, dark) as browser:
        for _ in range(2):
            wide = "return [scrollX, document.documentElement.scrollWidth, innerWidth]"
            scrolled, needed, has = browser.execute_script(f"scrollBy(500, 0); {wide}")
            assert scrolled == 0
            assert needed <= has == width
            browser.find_element("id", "open").click()
        # Open details can be read without scrolling the table they are in.
        browser.find_element("id", "open").click()
        right = browser.execute_script(
            "return Math.max(...[...document.querySelectorAll('#ops dl')]"
            ".map(e => e.getBoundingClientRect().right))"
        )
        assert right <= width
        color = "return getComputedStyle(document.body).backgroundColor"
        assert (browser.execute_script(color) == "rgb(255, 255, 255)") is not dark


def test_it_prints_on_paper(tmp_path: Path) -> None:
    with shown("resnet20", dark=True) as browser:
        # A4, in inches.
        size = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
        data = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", size)["data"])
        assert data.count(b"/Type /Page\n") in range(3, 9)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.find_element("id", "search").is_displayed()
        color = "return getComputedStyle(document.body).backgroundColor"
        assert browser.execute_script(color) == "rgb(255, 255, 255)"


def test_names_do_not_run(tmp_path: Path) -> None:
    changed = renamed(document("two_heads"), "down1.0", EVIL)
    page = Report.from_json(json.dumps(changed)).save_html(tmp_path / "evil.html")
    # What escaping would let through, the policy stops.
    leaked = page.read_text().replace("<h1>", "<h1><script>document.title = 'ran'</script>", 1)
    (tmp_path / "leaked.html").write_text(leaked)
    with open_page(page, 1280, 900) as browser:
        assert browser.get_log("browser") == []
        assert not browser.find_elements("css selector", "img")
        assert any(EVIL in name.text for name in browser.find_elements("css selector", "#ops td"))
    with open_page(tmp_path / "leaked.html", 1280, 900) as browser:
        assert browser.title != "ran"
        assert any("Content Security Policy" in e["message"] for e in browser.get_log("browser"))
