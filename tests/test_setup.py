"""Set-up: the shell scripts, the pins, and what the README tells a newcomer to type."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nanochat.common import REPO_DIR

SHELL_FILES = ["speedrun.sh", "tests/run.sh", "scripts/setup.sh", ".ci/run"]
PYTHONS = ["3.11", "3.12", "3.13"]
MACHINES = ["x86_64", "aarch64"]


def tracked_files() -> list[Path]:
    """Every file of the repository: git's list, or outside a checkout nothing."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=REPO_DIR, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [REPO_DIR / name for name in done.stdout.split("\0") if (REPO_DIR / name).is_file()]


def setup(root: Path, path: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Source scripts/setup.sh of `root` with this PATH and an empty home."""
    command = ["bash", "-c", "set -euo pipefail; source scripts/setup.sh"]
    keep = {k: v for k, v in os.environ.items() if k.startswith(("UV_", "PIP_", "SSL_")) or k.lower().endswith("proxy")}
    env = {**keep, "HOME": str(root), "PATH": path, **env}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bare_machine(tmp_path: Path) -> tuple[Path, Path]:
    """(a copy of what setup.sh reads, with no pins; a folder of programs to be the PATH, without cargo and cc)."""
    root, programs = tmp_path / "repo", tmp_path / "bin"
    for name in ["scripts/setup.sh", "rustbpe/Cargo.toml", "rustbpe/Cargo.lock", "rustbpe/pyproject.toml"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO_DIR / name, root / name)
    shutil.copytree(REPO_DIR / "rustbpe" / "src", root / "rustbpe" / "src")
    (root / "requirements.lock").write_text("# nothing\n")
    programs.mkdir()
    for name in ["bash", "cat", "cut", "dirname", "env", "find", "head", "sed", "sort"]:
        found = shutil.which(name)
        assert found, name
        (programs / name).symlink_to(found)
    (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    if shutil.which("uv"):
        fake(programs, "uv", f"HOME='{Path.home()}' PATH='{os.environ['PATH']}' exec uv \"$@\"")
    return root, programs


def fake(programs: Path, name: str, command: str) -> None:
    """A program that is one line of bash."""
    (programs / name).unlink(missing_ok=True)
    (programs / name).write_text(f"#!/usr/bin/env bash\n{command}\n")
    (programs / name).chmod(0o755)


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_parse(name: str):
    subprocess.run(["bash", "-n", name], cwd=REPO_DIR, check=True)


def test_setup_without_a_python_says_which_is_needed(bare_machine: tuple[Path, Path]):
    root, programs = bare_machine
    fake(programs, "python3", "[ $1 = --version ] && echo Python 3.9.18")
    done = setup(root, str(programs))
    assert done.returncode == 1
    assert done.stderr.startswith("setup: Python 3.11 or newer is needed (found: Python 3.9.18)")
    assert not (root / ".venv").exists()


@pytest.mark.slow
def test_setup_says_what_to_install_for_rust_and_for_c_and_goes_on_from_there(bare_machine: tuple[Path, Path]):
    root, programs = bare_machine
    done = setup(root, str(programs))
    assert done.returncode == 1 and "cargo is missing" in done.stderr and "rustup" in done.stderr, done.stderr
    fake(programs, "cargo", "echo 'cargo 1.99.0 (0000000 2026-01-01)'")
    done = setup(root, str(programs))
    assert done.returncode == 1 and "C compiler is needed" in done.stderr, done.stderr
    assert "setup: installing" not in done.stdout  # what had finished before is not done again
    fake(programs, "cc", "true")
    fake(programs, "cargo", "echo 'cargo 1.60.0 (0000000 2022-01-01)'")
    done = setup(root, str(programs))
    assert done.returncode == 1 and "cargo is 1.60.0: rustup update" in done.stderr, done.stderr


def locked() -> dict[str, list[tuple[str, str]]]:
    """{name: [(version, marker), ...]} of requirements.lock."""
    pins: dict[str, list[tuple[str, str]]] = {}
    for line in (REPO_DIR / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            pin, _, marker = line.partition(" ; ")
            name, version = pin.split("==")
            pins.setdefault(name, []).append((version, marker))
    return pins


def asked() -> list[Requirement]:
    """The core and development requirements of pyproject.toml, without our own crate."""
    project = tomllib.loads((REPO_DIR / "pyproject.toml").read_text())
    lines = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    return [r for r in map(Requirement, lines) if r.name != "rustbpe"]


def test_the_lock_holds_pins_only():
    lines = (REPO_DIR / "requirements.lock").read_text().splitlines()
    assert lines[1].startswith("#    uv pip compile pyproject.toml")  # how it is made again
    for line in lines:
        assert "://" not in line and " @ " not in line and "--index" not in line.partition("#")[0]
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*( ; .+)?", line), line
    assert "rustbpe" not in locked()  # ours comes from its folder, never from a registry


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_lock_satisfies_pyproject(python: str, machine: str):
    here = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    here |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    pins = locked()
    for requirement in asked():
        versions = [
            v
            for v, marker in pins.get(requirement.name, [])
            if not marker or Requirement(f"x ; {marker}").marker.evaluate(here)  # pyrefly: ignore
        ]
        assert len(versions) == 1, f"{requirement.name}: {versions}"
        assert requirement.specifier.contains(versions[0]), f"{requirement} but the lock has {versions[0]}"


def test_rustbpe_is_ours_and_not_the_registrys():
    rustbpe = importlib.import_module("rustbpe")
    crate = tomllib.loads((REPO_DIR / "rustbpe" / "Cargo.toml").read_text())
    assert Version(importlib.metadata.version("rustbpe")) == Version(crate["package"]["version"])
    assert rustbpe.train and rustbpe.Encoder


def test_the_project_asks_for_a_rustbpe_that_only_its_own_crate_is():
    project = tomllib.loads((REPO_DIR / "pyproject.toml").read_text())
    requirement = next(r for r in map(Requirement, project["project"]["dependencies"]) if r.name == "rustbpe")
    crate = tomllib.loads((REPO_DIR / "rustbpe" / "Cargo.toml").read_text())
    assert requirement.specifier.contains(crate["package"]["version"])
    assert not requirement.specifier.contains("0.1.0")  # the registry's package of the same name
    assert project["tool"]["uv"]["sources"]["rustbpe"] == {"path": "rustbpe"}


def test_no_file_names_a_registry_host_or_a_path_of_one_machine():
    words = ["pypi" + ".org", "python" + "hosted", "static." + "crates.io", "index." + "crates.io"]
    words += ["/root" + "/", "/work" + "/", "/opt" + "/wheels", "/tmp" + "/scratch"]
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        text = re.sub(
            r"registry\+https://github\.com/rust-lang/crates\.io-index", "", text
        )  # how Cargo.lock says "public"
        found += [f"{path.relative_to(REPO_DIR)}: {word}" for word in words if word in text]
        found += [f"{path.relative_to(REPO_DIR)}: {home}" for home in re.findall(r"/home/\w+/", text)]
    assert found == []


# --- what the README tells a newcomer to type -------------------------------------------------------------------------


def typed() -> list[str]:
    """Every command line in the README's and the docs' code blocks, and every `command` in their tables."""
    commands = []
    for page in [REPO_DIR / "README.md", *sorted((REPO_DIR / "docs").glob("*.md"))]:
        text = page.read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            commands += block.replace("\\\n", " ").splitlines()
        commands += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [c.partition(" #")[0].strip() for c in commands if c.strip()]


def modules() -> list[tuple[str, list[str]]]:
    """(module, the arguments after it) of every `-m module` typed."""
    found = (re.search(r"(?:^|\s)-m ((?:nanochat|scripts|tasks)\.[\w.]+)(.*)", c) for c in typed())
    return [(m[1], m[2].split()) for m in found if m]


def test_the_readme_is_short_enough_to_read():
    assert len((REPO_DIR / "README.md").read_text().splitlines()) < 200


def test_every_module_a_page_runs_exists():
    names = {name for name, _ in modules()}
    assert {"scripts.base_train", "scripts.chat_cli"} <= names
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []


def test_every_script_and_config_a_page_names_exists():
    words = {word for c in typed() for word in c.split()}
    files = {w for w in words if re.fullmatch(r"[\w./-]+\.(sh|py)", w) and "/" in w} | {"speedrun.sh"}
    assert len(files) >= 3
    assert sorted(f for f in files if not (REPO_DIR / f).is_file()) == []


def test_every_flag_a_page_passes_is_one_the_script_has():
    checked, unknown = 0, []
    for name, arguments in modules():
        if not name.startswith("scripts."):
            continue
        kinds = [c for c in vars(importlib.import_module(name)).values() if is_dataclass(c) and isinstance(c, type)]
        config = next(c for c in kinds if c.__module__ == name and c.__name__.endswith("Config"))
        known = {f.name for f in fields(config)} | set(getattr(config, "SHORT", {})) | {"help"}
        for flag in re.findall(r"(?:^|\s)--?([a-zA-Z][\w-]*)", " ".join(arguments)):
            checked += 1
            if flag.replace("-", "_") not in known:
                unknown.append(f"{name}: {flag}")
    assert checked > 3 and unknown == []
