"""The catalogue: each loss has a page, from its docstrings and docs/losses/NAME.md, and all numbers on it are right."""

import contextlib
import inspect
import io
import pathlib
import re
import sys
import textwrap

import pytest
import torch
from mkdocs.exceptions import PluginError

import kdjax
import kdtorch
from docs import catalogue
from kdlosses.pages import losses
from kdtorch.make_loss import OTHERS, PUBLISHED
from parity.cases import LOSSES as ROWS

ROOT = pathlib.Path(__file__).parent.parent
LOSSES = list(losses(kdjax))
PAGES = [loss for family in catalogue.by_family().values() for loss in family]
BY_NAME = {loss.name: loss for loss in PAGES}


@pytest.fixture(params=PAGES, ids=lambda loss: loss.name)
def loss(request):
    return request.param


def written(name, **sections):
    """A page for a test, with everything that a page must have, unless the test removes it."""
    front = {"family": "logits", "cost": "B C; B C", "picture": "curves", "caption": "Curves", **name}
    lines = [f"{key}: {value}" for key, value in front.items() if value is not None]
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return "\n".join(["---", *lines, "---", "", body, ""])


def test_every_loss_has_a_page():
    assert set(LOSSES) <= BY_NAME.keys() <= set(kdjax.__all__) & set(kdtorch.__all__)


def test_a_family_is_a_folder(loss):
    for package in (kdjax, kdtorch):
        assert getattr(package, loss.name).__module__.split(".")[:2] == [package.__name__, loss.meta["family"]]


def test_the_front_matter_says_what_the_table_of_losses_says(loss):
    rows = [row for row in ROWS if row.name == loss.name]
    assert rows
    if "State" not in "".join(rows[0].inputs.values()):  # a state couples examples too, but the row is about the value
        assert ("couples" in loss.meta) == rows[0].batch_coupled
    assert ("labels" in loss.meta) == bool({"labels", "distribution", "index"} & set(rows[0].inputs.values()))


def test_a_page_has_every_section_once_and_what_the_docstring_says(loss):
    text = catalogue.page(loss)
    outside_code = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    assert re.findall(r"^# (.*)$", outside_code, re.M) == [f"`{loss.name}`"]
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings in ([*catalogue.SECTIONS], [x for x in catalogue.SECTIONS if x != "Hyperparameters"])
    said = loss.docstring()
    for part in (said.summary, said.formula, said.returns, said.paper):
        assert text.count(part) == 1
    for package in ("kdjax", "kdtorch"):
        assert loss.docstring(package).example.replace("\n", "\n    ") in text
        for name in loss.docstring(package).arguments:
            assert re.search(rf"^\| `{name}`", text, re.M)
    assert f"![{loss.meta['caption']}](../pictures/{loss.name}.svg)" in text
    kind = loss.meta["picture"].split()[0]
    assert f"\ndef {kind}(loss: Loss" in (ROOT / "docs" / "pictures.py").read_text()


def test_links_to_the_api_lead_to_public_names(loss):
    found = re.findall(r"\]\[(kd[\w.]+)\]", catalogue.page(loss))
    assert {f"kdjax.{loss.name}", f"kdtorch.{loss.name}"} <= set(found)
    for reference in found:
        package, *modules, name = reference.split(".")
        face = getattr({"kdjax": kdjax, "kdtorch": kdtorch}[package], modules[0]) if modules else sys.modules[package]
        assert name in face.__all__


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("dino_loss", ["DINOState", "dino_init", "dino_teacher_temperature", "nn.DINOLoss"]),
        ("crcd_loss", ["CRCDState", "crcd_init", "crcd_negatives", "nn.CRCDLoss"]),
        ("crd_loss", ["CRDState", "crd_init", "nn.CRDLoss"]),
        ("dcn_loss", ["nn.DynamicCenterNormLoss"]),
        ("kl_loss", []),
    ],
)
def test_a_page_links_what_is_used_with_its_loss(name, want):
    found = re.findall(r"\]\[kdtorch\.([\w.]+)\]", catalogue.api(BY_NAME[name]))
    assert found == [name, *want]


def test_both_examples_print_the_same(loss):
    """That they run is tested by the doctests."""
    printed = [re.findall(r"^(?!>>>|\.\.\.).*$", loss.docstring(x).example, re.M) for x in ("kdjax", "kdtorch")]
    assert printed[0] == printed[1] != []


def test_the_code_of_a_page_prints_the_numbers_of_its_table(loss, monkeypatch):
    """The code prints one line for each row of the table; the first row is this library."""
    monkeypatch.chdir(ROOT)
    text = loss.sections["How implementations differ"]
    folded = re.search(r'^\?\?\? example "Code for these numbers"\n\n    ```python\n(.*?)^    ```', text, re.M | re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(textwrap.dedent(folded[1]), {})
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", text, re.M)]
    assert rows[0] == ["implementation", "what it computes", "loss"]
    assert [set(line.split()) for line in printed.getvalue().splitlines()] == [{row[-1]} for row in rows[2:]]
    assert loss.name in folded[1].split("print", 1)[0]
    stated = re.findall(r"\d\.\d{4}\b", text.replace(folded[0], ""))
    assert stated == [number for row in rows[2:] for number in re.findall(r"\d\.\d{4}\b", row[-1])]


def test_the_names_of_a_configuration_and_what_they_read():
    told = {name: reads for loss in PAGES for name, reads in loss.meta.get("config", {}).items()}
    assert told.keys() == (PUBLISHED | OTHERS).keys()
    torch.manual_seed(0)
    given = {name: torch.randn(4, 6) for name in ("stu", "tea", "fea_stu")}
    given |= {name: torch.randn(4, 3) for name in ("score_stu", "score_tea")}
    given |= {name: [torch.randn(4, 2, 5, 5)] for name in ("feats_stu", "feats_tea")}
    given |= {name: torch.randn(4, 3, 6) for name in ("patches_stu", "patches_tea", "tokens_stu", "tokens_tea")}
    given |= {"index": torch.arange(4), "target": torch.arange(4) % 3, "mask": torch.arange(12).view(4, 3) % 2 == 0}
    for name, text in told.items():
        model = {"METRIC_LOSS_TYPE": f"kd-{name}", "KD_LOSS_WEIGHT": [1.0], "FEAT_DIM": 6, "CLS_FEA_NUM": 6}
        model["KD_LOSS_ARGS"] = {"minilm": {"relation_heads": 2}} if name == "minilm" else {}
        loss = kdtorch.make_loss({"MODEL": model}, num_classes=3, num_data=10)
        reads = {key: given[key] for key in text.split(", ")}

        def call(reads, loss=loss):
            target = reads.get("target")
            return loss(feat={k: x for k, x in reads.items() if k != "target"}, target=target, epoch=0)

        assert call(reads).isfinite()
        for key in reads:  # and nothing else
            with pytest.raises((ValueError, TypeError), match=key):
                call({k: x for k, x in reads.items() if k != key})


def test_a_loss_without_a_name_of_its_own_is_configured_by_its_function():
    unnamed = [loss for loss in PAGES if "config" not in loss.meta]
    assert unnamed
    for loss in unnamed:
        (name,) = loss.configured
        assert f"`{name}`" in catalogue.api(loss)
        model = {"METRIC_LOSS_TYPE": f"kd-{name}", "KD_LOSS_WEIGHT": [1.0], "FEAT_DIM": 6, "CLS_FEA_NUM": 6}
        model["KD_LOSS_ARGS"] = {"minilm": {"relation_heads": 2}} if name == "minilm" else {}
        options = inspect.signature(getattr(kdtorch, loss.name)).parameters.values()
        needed = {
            x.name: 1 if x.annotation == "int" else 0.5
            for x in options
            if x.kind is x.KEYWORD_ONLY and x.default is x.empty
        }
        model |= {"KD_LOSS_ARGS": {name: needed}}
        assert list(kdtorch.make_loss({"MODEL": model}, num_classes=3, num_data=10).losses) == [name]


def test_the_tables_have_every_loss_once():
    for made, folder in ((catalogue.catalogue(), ""), (catalogue.choosing(), "losses/"), (catalogue.uses(), "losses/")):
        rows = re.findall(rf"^(?:\||-) \[`(\w+)`\]\({folder}(\w+)\.md\)", made, re.M)
        assert rows == [(loss.name, loss.name) for loss in PAGES]
        widths = {line.count(" | ") for line in made.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    for loss in PAGES:
        for result in loss.meta.get("reported", ()):
            assert result in catalogue.choosing()
            assert f"- {result}" in catalogue.page(loss)


def test_a_use_is_the_first_point_and_its_links_are_those_of_choosing():
    first = "- Where labels\n  are known, beside [`kl_loss`](kl_loss.md#cost), see [here](../scaling.md).\n- Not else."
    loss = catalogue.Loss("new_loss", {}, {"When to use it": first})
    want = "Where labels are known, beside [`kl_loss`](losses/kl_loss.md#cost), see [here](scaling.md)."
    assert catalogue.use(loss) == want


@pytest.mark.parametrize(
    ("front", "sections", "message"),
    [
        ({"family": "logit"}, {}, r"family can be \['features', 'logits', .*, got \['logit'\]"),
        ({"family": None}, {}, r"front matter needs \['family'\]"),
        ({"cost": None, "caption": None}, {}, r"front matter needs \['caption', 'cost'\]"),
        ({"label": "classes"}, {}, r"front matter can be .*'labels'.*, got \['label'\]"),
        ({}, {"Idea": "."}, r"headings can be .*'Formula'.*, got \['Idea'\]"),
    ],
)
def test_a_page_that_does_not_fit_says_what_does(monkeypatch, tmp_path, front, sections, message):
    monkeypatch.setattr(catalogue, "PAGES", tmp_path)
    (tmp_path / "new_loss.md").write_text(written(front, **sections))
    with pytest.raises(PluginError, match=f"docs/losses/new_loss.md: the {message}"):
        catalogue.read("new_loss")


def test_a_page_of_no_loss_says_so():
    with pytest.raises(PluginError, match=r"docs/losses/new_loss.md: kdtorch has no public name 'new_loss'"):
        catalogue.Loss("new_loss", {}, {}).function("kdtorch")


def test_a_page_without_a_use_says_so():
    with pytest.raises(PluginError, match=r"docs/losses/new_loss.md: 'When to use it' must begin"):
        catalogue.use(catalogue.Loss("new_loss", {}, {"When to use it": "Always."}))


def test_a_bar_ends_no_cell():
    assert catalogue.table("a | b", [["|x|", "`p|q`"]]).splitlines()[-1] == r"| \|x\| | `p|q` |"
