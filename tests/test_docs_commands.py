"""Every command of ours that README, docs/ or a config file shows has keys that its script takes."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.common import REPO_DIR
from nanochat.config import UserError

PAGES = [
    REPO_DIR / "README.md",
    *sorted((REPO_DIR / "docs").glob("*.md")),
    *sorted((REPO_DIR / "configs").glob("*.py")),
]
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)  # of a page; of a config file, its docstring
COMMAND = re.compile(r"(?:python|torchrun)\b[^`|\n]*?-m (scripts\.\w+)([^`|\n]*)")
PLACEHOLDER = re.compile(r"[A-Z]+\.py|--help")
HISTORY = "LOG.md"  # commands there are of their day


class Parsed(Exception):
    """Raised in place of what the script would do next."""


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(page, module, arguments), each once."""
    seen = set()
    for page in PAGES:
        if page.name == HISTORY:
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        shown = text.split('"""')[1:2] if page.suffix == ".py" else CODE.findall(text)
        for module, rest in COMMAND.findall("\n".join(shown)):
            words = shlex.split(re.split(r"\s&+(?:\s|$)|\s>|;", rest)[0], comments=True)
            if any(PLACEHOLDER.fullmatch(word) for word in words):
                continue
            if (module, *words) not in seen:
                seen.add((module, *words))
                yield page.name, module, words


COMMANDS = list(commands())


def test_there_are_many() -> None:
    assert len(COMMANDS) > 60 and len({module for _, module, _ in COMMANDS}) > 20


@pytest.mark.parametrize(("page", "module", "words"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_a_shown_command_has_keys_its_script_takes(
    page: str, module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO_DIR)
    script = importlib.import_module(module)
    real = script.load_config

    def load(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(script, "load_config", load)
    try:
        script.main(words)
    except Parsed:
        return
    except UserError as e:
        pytest.fail(f"{page}: python -m {module} {' '.join(words)}: {e}")
    pytest.fail(f"{page}: {Path(script.__file__).name} did not read its keys through load_config")
