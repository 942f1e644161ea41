"""The README's map: every script and every page is on it, and nothing else."""

import re

from nanochat.common import REPO_DIR

README = (REPO_DIR / "README.md").read_text(encoding="utf-8")


def test_every_script_stands_in_the_layout_once() -> None:
    layout = README.split("## Layout")[1].split("```")[1]
    lines = layout.split("\nscripts/")[1].split("\nconfigs/")[0].splitlines()[1:]
    named = [word for line in lines for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\b(?:describe|export)\b", line)]
    assert sorted(named) == sorted(p.stem for p in (REPO_DIR / "scripts").glob("*.py") if p.stem != "__init__")


def test_every_folder_of_code_stands_in_the_layout() -> None:
    layout = README.split("## Layout")[1].split("```")[1]
    named = set(re.findall(r"^(\w+)/", layout, re.MULTILINE))
    assert named == {"nanochat", "tasks", "scripts", "configs", "rustbpe", "docs", "tests"}
    assert all((REPO_DIR / name).is_dir() for name in named)


def test_every_page_is_linked_and_every_link_leads_to_a_file() -> None:
    links = set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert {f"docs/{p.name}" for p in (REPO_DIR / "docs").glob("*.md")} <= links
    assert [link for link in sorted(links) if not (REPO_DIR / link).is_file()] == []
