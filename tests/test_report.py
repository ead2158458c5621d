"""`python -m parity` and the files that it writes."""

import importlib.metadata
import json
import pathlib

import jax
import pytest
import torch
from tiers import slow

import kdtorch
from parity import report
from parity.__main__ import main
from parity.compare import Comparison, Difference

FAST = ["--loss", "mse_loss", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def as_it_was():
    """Restore the settings of JAX, which the command changes for its process."""
    yield
    jax.config.update("jax_enable_x64", False)


def broken(monkeypatch):
    monkeypatch.setattr(kdtorch, "mse_loss", lambda s, t, **options: 1.001 * kdtorch.kl_loss(s, t, **options))


def test_all_is_within_its_limits(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main([*FAST, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "mse_loss │ float32" in text
    assert "all within their limits" in text
    content = json.loads(file.read_text())
    assert content["passed"]
    assert content["environment"]["jax"] == jax.__version__
    assert content["environment"]["torch"] == importlib.metadata.version("torch")
    sides = {(x["one"], x["other"], x["part"]) for x in content["differences"]}
    assert sides == {
        (one, other, part)
        for one, other in (("jax", "oracle"), ("torch", "oracle"), ("torch", "jax"))
        for part in ("value", "gradient")
    }


@pytest.mark.parametrize("name", ["mse", "mse_loss"])
def test_a_short_name_will_do(name, capsys):
    assert main(["--loss", name, "--framework", "torch", "--dtype", "float64"]) == 0
    text = capsys.readouterr().out
    assert "│ mse_loss │ float64 │" in text
    assert text.count("float64") == 1


def test_what_fails_is_repeated_alone(monkeypatch, capsys):
    broken(monkeypatch)
    assert main([*FAST, "--tries", "3", "--seed", "4"]) == 1
    text = capsys.readouterr().out
    assert "over their limit" in text
    assert "mse_loss draw-5" in text
    (command,) = [line for line in text.splitlines() if line.startswith("to repeat:") and "--seed 5" in line]
    arguments = command.split("-m parity ")[1].split()
    assert arguments == ["--loss", "mse_loss", "--dtype", "float32", "--tries", "1", "--seed", "5"]
    assert main(arguments) == 1
    assert "draw-5" in capsys.readouterr().out


def test_a_loss_that_raises_is_named(monkeypatch, capsys):
    def raises(*args, **options):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(kdtorch, "mse_loss", raises)
    assert main(FAST) == 1
    assert "torch raised RuntimeError: out of paper" in capsys.readouterr().out


def test_one_framework_alone(capsys):
    assert main([*FAST, "--framework", "torch", "--tries", "2"]) == 0
    assert "to jax" not in capsys.readouterr().out


@slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_compiled(capsys):
    torch._dynamo.reset()
    assert main([*FAST, "--framework", "torch", "--compile", "--tries", "1"]) == 0
    assert "to torch" in capsys.readouterr().out  # compiled compared with eager


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--loss", "ml_loss"],
            "argument --loss: no loss is called 'ml_loss'; similar names are kl_loss, uld_loss, mse_loss",
        ),
        (["--tries", "0"], "argument --tries: must be 1 or more, got 0"),
        (["--html", "/no/such/folder/x.html"], "argument --html: cannot write '/no/such/folder/x.html': No such file"),
        (["--json", "."], "argument --json: cannot write '.': Is a directory"),
    ],
)
def test_bad_arguments_fail_before_the_run(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def comparison():
    """A comparison of three subjects; one is far off, and one cannot be compared."""
    common = {"case": "ordinary", "one": "torch", "other": "oracle", "part": "value", "limit": 16.0}
    rows = [("b_loss", 2.0, ""), ("c_loss", 3e4, ""), ("a_loss", 0.5, "")]
    found = [
        Difference(
            name, dtype=dtype, ulp=ulp * (1 + 9 * (dtype == "float32")), relative=1e-9, problem=problem, **common
        )
        for name, ulp, problem in rows
        for dtype in ("float64", "float32")
    ]
    problem = "shape: torch [2], oracle <script>[]"
    found.append(Difference("c_loss", dtype="float16", ulp=float("inf"), problem=problem, **common))
    return Comparison(tuple(found))


def test_the_page_needs_nothing_else(tmp_path):
    file = tmp_path / "report.html"
    report.write_html(str(file), comparison())
    page = file.read_text()
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import"):
        assert reference not in page
    assert "&lt;script&gt;[]" in page
    assert importlib.metadata.version("jax") in page


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path, browser):
    file = tmp_path / "report.html"
    report.write_html(str(file), comparison())
    browser.set_window_size(1200, 900)
    browser.get(file.as_uri())
    assert "Parity" in browser.title
    assert "7 comparisons, 4 over their limit" in browser.find_element("css selector", ".verdict").text
    assert len(browser.find_elements("css selector", "#failures li")) == 4

    def column(number):
        return [x.text for x in browser.find_elements("css selector", f".sortable tbody td:nth-child({number})")]

    assert column(1) == [*["b_loss"] * 2, *["c_loss"] * 2, *["a_loss"] * 2, "c_loss"]
    loss, _, value = browser.find_elements("css selector", ".sortable th")
    loss.click()
    assert column(1) == ["a_loss"] * 2 + ["b_loss"] * 2 + ["c_loss"] * 3
    value.click()
    assert [x.split()[0] for x in column(3)] == ["0.5", "2", "5", "20", "3e+04", "3e+05", "✗"]
    value.click()
    assert column(3)[0] == "✗"

    shades = {
        x.value_of_css_property("background-color") for x in browser.find_elements("css selector", ".heat td[style]")
    }
    assert len(shades) >= 4
    assert browser.get_log("browser") == []
    browser.set_window_size(500, 800)  # a phone: tables scroll, and the page does not
    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")
    screenshot = pathlib.Path(tmp_path / "page.png")
    assert browser.save_screenshot(str(screenshot))
    assert len(screenshot.read_bytes()) > 10_000
