"""The site builds without warnings, contains all public names, and displays correctly in a browser."""

import functools
import html.parser
import http.server
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse
import zlib

import filelock
import pytest
from selenium.webdriver.support import expected_conditions as conditions
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.slow  # it draws every picture, builds the site, and opens a browser
ROOT = pathlib.Path(__file__).parent.parent
FACES = [f"{package}{part}" for package in ("kdjax", "kdtorch") for part in ("", ".nn", ".interop", ".teacher_cache")]
FACES.append("parity")
SEARCHES = {"DKD": "dkd_loss", "hcl": "hcl_loss", "center": "dino", "centre": "dino", "num_classes": "make_loss"}
WIDE, PHONE = (1440, 900), (390, 800)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built once by the first process."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            for command in (["docs/pictures.py"], ["-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]):
                done = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr
    return folder


def public(face):
    module = importlib.import_module(face)
    return [(f"{face}.{name}", getattr(module, name)) for name in module.__all__]


def methods(value):
    """The public methods of a class, without those of frameworks and dataclasses."""
    ours = (kind for kind in value.__mro__ if kind.__module__.partition(".")[0] in ("kdjax", "kdtorch", "parity"))
    return {name for kind in ours for name, x in vars(kind).items() if inspect.isfunction(x) and name[0] != "_"}


def test_every_public_name_has_an_entry(site):
    *_, entries = (site / "objects.inv").read_bytes().split(b"\n", 4)
    found = {line.split()[0] for line in zlib.decompress(entries).decode().splitlines()}
    names = {name: value for face in FACES for name, value in public(face)}
    assert names.keys() <= found
    classes = {value: name for name, value in names.items() if inspect.isclass(value)}  # by the last module that has it
    assert {f"{name}.{method}" for value, name in classes.items() for method in methods(value)} <= found


@pytest.mark.parametrize("package", ["kdjax", "kdtorch"])
def test_every_formula_of_a_docstring_is_there(site, package):
    texts = [inspect.getdoc(value) or "" for face in FACES if face.startswith(package) for _, value in public(face)]
    formulas = {formula for text in texts for formula in re.findall(r"\$\$?[^$]+\$\$?", text)}
    pages = "".join(path.read_text() for path in (site / "api" / package).glob("*.html"))
    assert pages.count('class="formula"') == len(formulas) > 15


class Page(html.parser.HTMLParser):
    """The contents of a page, and its links."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.text, self.inside = {""}, set(), set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif "src" in values or (tag == "link" and "href" in values):
            self.loads.add(values.get("src") or values["href"])
        if tag in ("code", "script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def test_what_is_in_the_pages(site):
    """Links and anchors exist, nothing is loaded from other hosts, and no LaTeX or code fence is left."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        assert not re.search(r"[$\\]|```", "".join(page.text)), path
        for address in page.links | page.loads:
            scheme, host, target, _, anchor = urllib.parse.urlsplit(address)
            if scheme or host:
                assert address in page.links, f"{path.name} loads {address}"
                continue
            where = (path.parent / urllib.parse.unquote(target)).resolve() if target else path
            if path.name == "404.html":  # a server may show it at any address
                where = site / target.lstrip("/")
            where = where / "index.html" if where.is_dir() else where
            assert where.exists(), f"{path.name} leads to {address}"
            if anchor and where in pages:
                assert urllib.parse.unquote(anchor) in pages[where].anchors, f"{path.name} leads to {address}"


@pytest.fixture
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def show(browser, size, scheme="light"):
    """Set the size of the screen and the colour scheme."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def asked_nobody_else(browser, address):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {x["params"]["request"]["url"] for x in messages if x["method"] == "Network.requestWillBeSent"}
    assert asked
    assert {x for x in asked if not x.startswith((f"{address}/", "data:", "blob:", "about:", "chrome"))} == set()


def said_nothing(browser):
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []


def test_every_picture_is_drawn_for_a_phone_too(site):
    """Except those of the notebooks, which a run of the notebook drew, and which scroll."""
    figures = [
        (path, x) for path in site.rglob("*.html") for x in re.findall(r"<figure>.*?</figure>", path.read_text())
    ]
    assert len(figures) > 40
    for path, figure in figures:
        phone = re.search(r'<source media="\(max-width: 44em\)" srcset="([^"]*)"', figure)
        assert path.parent.name == "notebooks" or (phone and (path.parent / phone[1]).exists()), (path, figure)


# elements outside of the window, unless one can scroll to them
OUTSIDE = """
const scrolls = x => x && (x.scrollWidth > x.clientWidth && /auto|scroll/.test(getComputedStyle(x).overflowX)
                           || scrolls(x.parentElement));
return [...document.querySelectorAll("article *")].filter(x => x.checkVisibility()
    && x.getBoundingClientRect().right > window.innerWidth + 1 && !scrolls(x)).map(x => x.outerHTML.slice(0, 200));
"""
CUT = """
return [...document.querySelectorAll("article pre > code")].filter(x => x.checkVisibility()
    && x.scrollWidth > x.clientWidth).map(x => x.textContent);
"""
FLAT = """
return [...document.querySelectorAll("article math")].filter(x => x.checkVisibility()
    && !(x.getBoundingClientRect().width > 2 && x.getBoundingClientRect().height > 5)).map(x => x.textContent);
"""


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_page_fits(site, address, browser, size):
    show(browser, size)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/search_index.json"]})  # it takes most of the time
    formulas = 0
    pages = [path for path in sorted(site.rglob("*.html")) if "kdtorch" not in path.parts]  # kdjax's are as wide
    for path in pages:
        browser.get(f"{address}/{path.relative_to(site)}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0], path
        assert browser.execute_script(OUTSIDE) == [], path
        assert browser.execute_script(FLAT) == [], path
        assert size == PHONE or browser.execute_script(CUT) == [], path
        formulas += browser.execute_script("return document.querySelectorAll('math').length")
        assert browser.execute_script("return [...document.images].every(x => x.complete && x.naturalWidth)"), path
    assert formulas > (60 if size == PHONE else 0)
    asked_nobody_else(browser, address)


def test_light_and_dark(address, browser):
    def brightness():
        colours = re.findall(
            r"[\d.]+", browser.find_element("css selector", "body").value_of_css_property("background-color")
        )
        return sum(map(float, colours[:3])) / 3

    for scheme in ("light", "dark"):
        show(browser, WIDE, scheme)
        browser.get(f"{address}/losses/kl_loss.html")
        assert (brightness() > 200) == (scheme == "light")
        picture = browser.find_element("css selector", "article img")
        assert ("invert" in picture.value_of_css_property("filter")) == (scheme == "dark")
    browser.find_element("css selector", "label[title='To light']").click()
    assert brightness() > 200
    browser.get(f"{address}/index.html")  # the choice is remembered
    assert brightness() > 200
    said_nothing(browser)
    asked_nobody_else(browser, address)


def test_search_of_a_site_that_is_opened_from_disk(site, browser):
    show(browser, WIDE)
    browser.get(f"file://{site}/index.html")
    for word, place in SEARCHES.items():
        field = browser.find_element("css selector", ".md-search__input")
        field.clear()
        field.send_keys(word)
        results = f"//a[contains(@class, 'md-search-result__link')][contains(@href, '{place}')]"
        WebDriverWait(browser, 10).until(conditions.presence_of_element_located(("xpath", results)), word)
    said_nothing(browser)
    asked_nobody_else(browser, f"file://{site}")


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_tabs_and_search(address, browser, size):
    show(browser, size)
    browser.get(f"{address}/losses/kl_loss.html")
    jax, torch = browser.find_elements("css selector", ".tabbed-block")
    assert (jax.is_displayed(), torch.is_displayed()) == (True, False)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", torch.find_element("xpath", "../.."))
    browser.find_element("xpath", "//label[.='PyTorch']").click()
    assert (jax.is_displayed(), torch.is_displayed()) == (False, True)
    assert "import torch" in torch.text
    browser.get(f"{address}/losses/dkd_loss.html")  # the other pages follow
    assert browser.find_elements("css selector", ".tabbed-block")[1].is_displayed()

    browser.get(f"{address}/index.html")
    for word, place in SEARCHES.items():
        field = browser.find_element("css selector", ".md-search__input")
        if not field.is_displayed():
            browser.find_element("css selector", "label.md-header__button[for=__search]").click()
        WebDriverWait(browser, 10).until(conditions.visibility_of(field))
        field.clear()
        field.send_keys(word)
        results = f"//a[contains(@class, 'md-search-result__link')][contains(@href, '{place}')]"
        WebDriverWait(browser, 10).until(conditions.presence_of_element_located(("xpath", results)), word)
    said_nothing(browser)
    asked_nobody_else(browser, address)
