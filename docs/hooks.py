"""Hooks of MkDocs: the catalogue, the API pages, notebooks, formulas as MathML, and pages from files outside docs/."""

import base64
import html
import json
import os
import pathlib
import posixpath
import re
from typing import Any

import catalogue
import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = {f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
OUTSIDE["README.md"] = "index.md"
PARTS = ("", "nn", "teacher_cache", "interop")
TWINS = {"kdjax": "kdtorch", "kdtorch": "kdjax"}
FRAMEWORKS = {"kdjax": "JAX", "kdtorch": "PyTorch"}
RENAMED = {"torch_teacher": "jax_teacher", "torch_loss": "jax_loss"}
RENAMED |= {other: name for name, other in RENAMED.items()}
ALONE = {"LossState", "fuse"}  # PyTorch has buffers instead of the first; `jax.jit` does the second


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages of the losses, by family, and those of the API."""
    catalogue.load.cache_clear()
    nav = {title: pages for entry in config.nav or () for title, pages in entry.items()}
    for family, losses in catalogue.by_family().items():
        nav["Losses"].append({catalogue.FAMILIES[family]: [f"losses/{loss.name}.md" for loss in losses]})
    for package in TWINS:
        nav["API"].append({package: [f"api/{page}" for page in sorted(public(package), key=families_first)]})
    nav["API"] += [f"api/{page}" for page in public("parity")]
    return config


def api_title(page: str, objects: dict[str, str]) -> str:
    """As people search for it: the family of losses, the only name of the page, or the module."""
    package, _, part = page.removesuffix(".md").partition("/")
    name = next(iter(objects)).rpartition(".")[2] if len(objects) == 1 else part
    return f"{package}: {catalogue.FAMILIES[part].lower() if part in catalogue.FAMILIES else name}" if part else package


def families_first(page: str) -> tuple[int, str]:
    families, part = list(catalogue.FAMILIES), pathlib.Path(page).stem
    return families.index(part) if part in families else len(families), part


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not written by hand."""
    for source, page in OUTSIDE.items():
        if page != "index.md" and (ROOT / source).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    rows = ["| name | summary |", "| --- | --- |"]
    for package in (*TWINS, "parity"):
        for page, objects in public(package).items():
            content = [f"# {api_title(page, objects)}", *(f"::: {name}" for name in objects)]
            files.append(File.generated(config, f"api/{page}", content="\n\n".join(content)))
            for name, summary in objects.items() if package in TWINS else ():
                if package == "kdjax" or not twin(name):
                    pair = (name, twin(name)) if package == "kdjax" else ("", name)
                    rows.append(f"| {references(pair)} | {summary} |")
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        for name, content in notebook(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    (index,) = (file for file in files if file.src_uri == "api/index.md")
    index.content_string = index.content_string.replace("TABLE", "\n".join(rows))
    return files


def notebook(path: pathlib.Path) -> dict[str, str | bytes]:
    """The page of a notebook, with the outputs and pictures of its last run."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"``` {{.python}}\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            if "image/png" in output.get("data", {}):
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![{cell['metadata']['caption']}]({name})")
    title, _, rest = parts[0].partition("\n")
    parts[0] = f"---\nhide: [toc]\n---\n\n{title}\n\n[Download this notebook]({path.name})\n{rest}"
    return {f"{path.stem}.md": "\n\n".join(parts), **pictures}


def public(package: str) -> dict[str, dict[str, str]]:
    """The pages of a package's API, each with its public names and their summaries; a name is on one page only."""
    module = catalogue.load(package)
    pages: dict[str, dict[str, str]] = {}
    seen = set()
    for part in PARTS if package in TWINS else PARTS[:1]:
        face = module[part] if part else module
        for name in sorted(face.exports, key=str.lower):
            origin = face.imports.get(name, f"{face.path}.{name}")
            if origin not in seen:
                seen.add(origin)
                page = f"{package}/{origin.split('.')[1].lstrip('_')}.md" if package in TWINS else f"{package}.md"
                summary = module[origin.partition(".")[2]].docstring.value.partition("\n")[0]
                pages.setdefault(page, {})[f"{face.path}.{name}"] = summary
    return pages


def twin(path: str) -> str:
    """The name in the other package, or "" if there is none."""
    package, _, rest = path.partition(".")
    *modules, name = rest.split(".")
    return "" if name in ALONE else ".".join([TWINS[package], *modules, RENAMED.get(name, name)])


def references(pair: tuple[str, str]) -> str:
    """Each name with the links to its frameworks below it, so that a phone has room for the summary."""
    links: dict[str, list[str]] = {}
    for path in filter(None, pair):
        package, _, name = path.partition(".")
        links.setdefault(name, []).append(f"[{FRAMEWORKS[package]}][{path}]")
    return "<br>".join(f"`{name}`<br>{', '.join(found)}" for name, found in links.items())


class Docstrings(griffe.Extension):
    """Shows doctests as an interactive session, and links each public object to that of the other framework."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and "```pycon" not in obj.docstring.value:  # an object with two names is visited twice
            obj.docstring.value = re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        origins = {name: pkg[pkg.imports[name].partition(".")[2]] for name in pkg.exports}
        for name, obj in origins.items():  # they precede modules of the same name
            pkg.set_member(name, obj)
        for face in (pkg[part] if part else pkg for part in PARTS) if pkg.name in TWINS else ():
            for name in face.exports:
                obj, other = face[name], twin(f"{face.path}.{name}")
                if other and not obj.is_alias:
                    summary, _, rest = obj.docstring.value.partition("\n\n")
                    link = f"In {TWINS[pkg.name]}: [`{other.rpartition('.')[2]}`][{other}]"
                    obj.docstring.value = f"{summary}\n\n{link}\n\n{rest}"


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Fill the pages of the catalogue, and make links to files of the repository links to their pages."""
    folder, _, name = page.file.src_uri.rpartition("/")
    if page.file.src_uri == "losses/index.md":
        markdown = markdown.replace("TABLES", catalogue.catalogue()).replace("SHARED", catalogue.shared())
    elif page.file.src_uri == "choosing.md":
        markdown = markdown.replace("TABLE", catalogue.choosing()).replace("LISTS", catalogue.uses())
    elif folder == "losses":
        markdown = catalogue.page(catalogue.read(name.removesuffix(".md")))
    if "founding" not in page.file.src_uri:  # say once what it is
        markdown = markdown.replace(
            "founding repository", f"[founding repository]({'../' * bool(folder)}moving/founding.md)", 1
        )
    return linked(markdown, page)


def linked(markdown: str, page: Page) -> str:
    """Replace a link to a file of the repository by a link to its page, or by its text if it has no page."""
    source = page.file.abs_src_path
    folder = pathlib.Path(source).parent if source else ROOT

    def link(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match["path"], ROOT)
        inside = path.startswith("docs/")
        if (inside and source) or not (ROOT / path).exists():
            return match[0]
        if not inside and path not in OUTSIDE:
            return match["text"]
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        target = os.path.relpath(target, pathlib.Path(page.file.src_uri).parent)
        return f"[{match['text']}]({target}{match['anchor'] or ''})"

    return re.sub(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)", link, markdown)


def on_page_content(content: str, page: Page, files: Files, **kwargs: Any) -> str:
    """Convert the LaTeX that arithmatex leaves to MathML, and pictures to figures; say where lines may and may not break."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        # at wide spaces a formula may be broken into lines
        math = "".join(convert(part, display=display) for part in re.split(r"\\q?quad\b", html.unescape(match["tex"])))
        # some space around names of functions
        math = re.sub(r"<(m[io])>([A-Za-z]{2,})</\1>", r'<mo lspace="0.17em" rspace="0.17em">\2</mo>', math)
        return f'<{match["tag"]} class="formula" data-search-exclude>{math}</{match["tag"]}>'

    def figure(match: re.Match[str]) -> str:
        image, caption, source = match.groups()
        phone = "{}_phone{}".format(*os.path.splitext(source))
        if files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), phone))):
            image = f'<picture><source media="(max-width: 44em)" srcset="{phone}">{image}</picture>'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    def cell(match: re.Match[str]) -> str:
        length = len(re.sub("<[^>]*>", "", match[1]))
        return f'<td style="--length: {length}">{match[1]}</td>' if length > 30 else match[0]

    def code(match: re.Match[str]) -> str:
        return re.sub(r"[^\s<>]{24,}", lambda word: re.sub("[/_.]", r"\g<0><wbr>", word[0]), match[0])

    left = r'(?s)<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>'
    content = re.sub(left, formula, content)
    content = re.sub(r'<p>(<img alt="([^"]+)" src="([^"]+)"[^>]*>)</p>', figure, content)
    content = re.sub(r"(?<=\d) (?=(?:ms|MiB|GiB|MB|GB)\b|\([\d.]+×)", "&nbsp;", content)
    content = re.sub(r"<td>(.*?)</td>", cell, content)
    return re.sub("<code>[^<]*</code>", code, content)
