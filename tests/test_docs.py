"""The manual holds together: links lead somewhere, method pages are whole, and everything is in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = [
    "schedules",
    "noise_shift",
    "one_more_step",
    "golden_noise",
    "noise_space",
    "propagation",
    "fitted_sampler",
    "timestep_field",
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As a web forge makes them of headings: lower case, spaces to dashes, no punctuation."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_link_inside_the_manual_leads_somewhere(page):
    links = [link for link in LINK.findall(page.read_text("utf-8")) if not link.startswith(("http", "mailto:"))]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", METHODS)
def test_a_method_page_has_equation_plot_limits_and_citation(name):
    text = (ROOT / f"docs/{name}.md").read_text("utf-8")
    assert re.search(r"^\$\$.*(?:=|\\min|\\approx).*\$\$", text, re.M), "an equation of its own line"
    plots = re.findall(r"!\[[^\]]+\]\((\w+\.(?:png|jpg))\)", text)
    assert plots and all((ROOT / "docs" / plot).stat().st_size > 1000 for plot in plots)
    assert re.search(r"^## Limits\n\n\S", text, re.M) and re.search(r"^```bibtex\n@\w+\{\w+,\n", text, re.M)


def test_the_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text("utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name}" not in index} == set()


def test_every_help_page_leads_to_the_glossary_and_no_word_is_explained_twice():
    for page in (ROOT / "web/docs").glob("*.md"):
        assert "/docs/glossary.md)" in page.read_text("utf-8"), page.name
    words = re.findall(r"^### (.*)$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.M)
    named = [word for line in words for word in line.split(", ")]
    assert len(named) == len(set(named)) > 50
