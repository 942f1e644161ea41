# Sourced by speedrun.sh and tests/run.sh, from any folder: makes .venv, the one Python environment, and builds rustbpe.
# A second run does nothing but check. Needs Python 3.11+, Rust (cargo) and a C compiler; says so where one is missing.
# Nothing is installed outside .venv. PYTHON=/path/to/python3.12 chooses the Python that .venv is made with.
# Afterwards the shell is in the root of the repository, .venv/bin comes first on PATH, and `python` is .venv's.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_fail() {
    echo "setup: $1" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

setup_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if new_enough "$candidate"; then
            PYTHON=$(command -v "$candidate")
            return
        fi
    done
    setup_fail "Python 3.11 or newer is needed (found: $(${PYTHON:-python3} --version 2>&1 | head -n 1)): install it, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# uv from PATH; else from .venv; else .venv is made by Python's own venv and uv put into it by pip. Never into the
# system's Python, which may be managed by the distribution (PEP 668).
setup_uv() {
    if uv --version >/dev/null 2>&1; then
        UV=uv
        return
    fi
    UV=.venv/bin/uv
    if new_enough .venv/bin/python && "$UV" --version >/dev/null 2>&1; then
        return
    fi
    echo "setup: installing uv into .venv with pip"
    if "$PYTHON" -m venv --clear .venv >/dev/null 2>&1; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || setup_fail "pip could not install uv: see the message above"
    elif "$PYTHON" -m pip --version >/dev/null 2>&1; then # a Python without ensurepip, but with a pip of its own
        "$PYTHON" -m venv --clear --without-pip .venv || setup_fail "$PYTHON cannot make a virtual environment"
        "$PYTHON" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check uv || setup_fail "pip could not install uv: see the message above"
    else
        setup_fail "$PYTHON has neither ensurepip nor pip, and uv is missing: on Debian or Ubuntu, apt-get install python3-venv"
    fi
}

setup_venv() {
    if new_enough .venv/bin/python; then
        return
    fi
    if [ -e .venv ]; then
        echo "setup: .venv has no working Python 3.11+: making it again"
    fi
    "$UV" venv --quiet --clear --python "$PYTHON" .venv || setup_fail "uv could not make .venv with $PYTHON"
}

# digest FILE ...: one hash of the Python version, the names and the contents.
digest() {
    .venv/bin/python - "$@" <<'PY'
import hashlib, pathlib, sys
h = hashlib.sha256(sys.version.encode())
for name in sorted(sys.argv[1:]):
    data = pathlib.Path(name).read_bytes()
    h.update(f"{name} {len(data)}\n".encode() + data)
print(h.hexdigest())
PY
}

setup_packages() {
    local want
    want=$(digest requirements.lock)
    if [ "$(cat .venv/lock.stamp 2>/dev/null)" = "$want" ]; then
        return
    fi
    echo "setup: installing the packages of requirements.lock into .venv (torch with CUDA: some 3 GB the first time)"
    "$UV" pip install --quiet --python .venv/bin/python -r requirements.lock || setup_fail "uv could not install requirements.lock: see the message above"
    echo "$want" >.venv/lock.stamp
}

setup_rust() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    cargo --version >/dev/null 2>&1 || setup_fail "Rust is needed, and cargo is missing: install it with rustup (https://rustup.rs)"
    command -v cc >/dev/null || setup_fail "a C compiler is needed, and cc is missing: on Debian or Ubuntu, apt-get install build-essential"
    local need have
    need=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' rustbpe/Cargo.toml)
    have=$(cargo --version | cut -d ' ' -f 2)
    if [ "$(printf '%s\n' "$need" "$have" | sort -V | head -n 1)" != "$need" ]; then
        setup_fail "Rust $need or newer is needed, cargo is $have: rustup update"
    fi
}

# The registry has another package called rustbpe, so ours is always installed from its folder, by name of the path,
# and again only when a file it is built from has changed.
setup_rustbpe() {
    local want
    # shellcheck disable=SC2046
    want=$(digest rustbpe/Cargo.toml rustbpe/Cargo.lock rustbpe/pyproject.toml $(find rustbpe/src -name '*.rs'))
    if [ "$(cat .venv/rustbpe.stamp 2>/dev/null)" = "$want" ]; then
        return
    fi
    setup_rust
    echo "setup: building rustbpe"
    PATH="$PWD/.venv/bin:$PATH" MATURIN_PEP517_ARGS=--locked "$UV" pip install --quiet --python .venv/bin/python \
        --no-deps --no-build-isolation --reinstall-package rustbpe ./rustbpe || setup_fail "rustbpe did not build: see the message above"
    .venv/bin/python -c 'import rustbpe; rustbpe.train, rustbpe.Encoder' || setup_fail "rustbpe was built but does not work: see the message above"
    echo "$want" >.venv/rustbpe.stamp
}

# What the tests compare with and nothing else needs: the plain-torch references in two packages that otherwise want CUDA.
# With these variables their set-up compiles nothing. tests/run.sh calls this; without the network, those tests skip.
setup_oracles() {
    local want="mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0"
    if [ "$(cat .venv/oracles.stamp 2>/dev/null)" = "$want" ]; then
        return
    fi
    echo "setup: installing the references that tests compare with ($want)"
    # shellcheck disable=SC2086
    if MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
        "$UV" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation $want; then
        echo "$want" >.venv/oracles.stamp
    else
        echo "setup: could not install them: the tests that need them will be skipped" >&2
    fi
}

# Without its bytecode on disk torch is compiled anew at every start of Python: 3.5 seconds instead of 1.7 of a core, 8
# instead of 3.3 where something is trained. Containers often forbid to write it.
unset PYTHONDONTWRITEBYTECODE

setup_python
setup_uv
setup_venv
setup_packages
setup_rustbpe
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
