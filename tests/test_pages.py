"""The tables that README.md and docs/ show are those of results/, and the pages keep to their lengths."""

import re

import printed_commands
import pytest
from conftest import ROOT

from scripts.tables import pages
from utils.yaml_io import read_yaml

ROWS = pages.read_rows(pages.MEASURED / "accuracy.csv")
DOCS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in printed_commands.documents()
}
LOG = "docs/LOG.md"
SETTINGS_LIST = "docs/SETTINGS_LIST.md"  # nobody reads it through


def test_each_table_is_on_a_page():
    marked = [name for page in pages.PAGES for _, name, _ in pages.MARKED.findall((ROOT / page).read_text())]
    assert sorted(marked) == sorted(pages.tables(ROWS))


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_show_what_was_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.filled(text, ROWS) == text, "run python -m scripts.tables.pages"


def test_another_number_changes_the_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = [row | {"pro": "0.5"} if row["category"] == "screw" else row for row in ROWS]
    assert "50.0±0.0" not in text and "50.0±0.0" in pages.filled(text, changed)


def test_every_row_of_the_file_is_in_a_table():
    names = ("images", "large", "no_bank", "video", "transistor", "short")
    shown = sum(int(row[4]) for name in names for row in pages.tables(ROWS)[name]()[1:])
    assert shown == sum(row["setting"] == "one-class" for row in ROWS)


def test_a_small_bank_is_a_bank():
    rows = [row | {"options": "--set model.bank_fraction=0.25"} for row in ROWS if row["model"] == "remind"]
    assert len(pages.tables(rows)["no_bank"]()) == 1 < len(pages.tables(ROWS)["no_bank"]())


def test_an_unknown_marker_is_named():
    with pytest.raises(ValueError, match="no table is called 'nonsense'"):
        pages.filled("<!-- generated: nonsense -->\n<!-- end -->", ROWS)


def test_the_readme_is_an_entrance():
    text = DOCS["README.md"]
    assert len(text.split()) <= 900 and len(text.splitlines()) <= 150
    cells = [cell for line in text.splitlines() if " | " in line for cell in line.split(" | ")]
    assert max(map(len, cells)) <= 100


def test_citations_are_those_of_the_citation_file():
    about, text = read_yaml(ROOT / "CITATION.cff"), DOCS["README.md"]
    assert f"version={{{about['version']}}}" in text
    for work in (about, about["preferred-citation"], *about["references"]):
        names = [f"{a['family-names']}, {a['given-names']}" for a in work["authors"] if "family-names" in a]
        assert f"title={{{work['title']}}}" in text
        assert " and ".join(names) in text


def prose(text: str) -> str:
    """A page without its tables and blocks of commands."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    return "\n".join(line for line in text.splitlines() if " | " not in line and not line.startswith("| "))


def test_guides_are_short():
    """Every word of a page counts, tables and commands too."""
    words = {name: len(text.split()) for name, text in DOCS.items() if name not in (LOG, "README.md")}
    assert sum(words.values()) <= 14_000
    assert {name for name, count in words.items() if count > 900 and name != SETTINGS_LIST} == set()


def test_the_list_of_settings_is_nothing_else():
    assert prose(DOCS[SETTINGS_LIST]).strip() == "# All settings"


def test_the_index_has_a_line_for_each_page():
    text = DOCS["docs/README.md"]
    pages_named = re.findall(r"\]\((\w+\.md)\)", text)
    assert sorted(pages_named) == sorted(
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"
    )
    assert len(text.splitlines()) <= 20


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", printed_commands.documents(), ids=str)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


@pytest.mark.slow
def test_named_programs_and_configs_exist():
    for page, text in DOCS.items():
        for name in set(re.findall(r"`([\w./-]+\.(?:py|yaml|sh))`", text)) if page != LOG else ():
            found = [ROOT / name, ROOT / "configs" / name, *ROOT.glob(f"*/**/{name}")]
            assert "NAME" in name or any(path.exists() for path in found), f"{page} names {name}"


def test_quoted_entries_of_the_log_exist():
    titles = set(re.findall(r"^### (.*)$", DOCS[LOG], re.M))
    for name, text in DOCS.items():
        for title in re.findall(r'\(LOG\.md\), "([^"]+)"', " ".join(text.split())):
            assert title in titles, f"{name} quotes {title}"
