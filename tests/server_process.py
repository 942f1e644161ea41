"""One of our HTTP services as a process of its own."""

import re
import signal
import subprocess
import sys

from nanochat.common import REPO_DIR


def start(argv: list[str], env: dict[str, str] | None = None) -> tuple[subprocess.Popen[str], str]:
    """`python -m ARGV` on a free port -> (process, the address it says)"""
    pipe = subprocess.PIPE
    argv = [sys.executable, "-m", *argv, "--port", "0"]
    process = subprocess.Popen(argv, cwd=REPO_DIR, stdout=pipe, stderr=pipe, text=True, env=env)
    assert process.stdout is not None
    found = None
    while found is None:
        line = process.stdout.readline()
        assert line, process.communicate()
        found = re.search(r"http://\S+", line)
    return process, found[0]


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """-> (exit code, stderr)"""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    return process.returncode, err
