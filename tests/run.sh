#!/usr/bin/env bash
# Everything that must be clean before a push: format, lint, types, layers, Rust, Python tests. Stops at the first failure.
#     bash tests/run.sh                    everything
#     bash tests/run.sh -m "not slow"      arguments go to pytest
#     bash tests/run.sh -n 0 --pdb         in one process, not in two
set -euo pipefail
if [ "${CI:-}" = true ]; then
    export NO_COLOR=1 CARGO_TERM_COLOR=never PY_COLORS=0
fi
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
setup_rust
setup_oracles
# Tensors here are small: more threads cost time, and one thread adds up in the same order on every machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYO3_PYTHON="$PWD/.venv/bin/python" # what the crate's Python skin is checked against

step() {
    local start=$SECONDS
    echo "== $*"
    "$@"
    echo "   $((SECONDS - start)) s"
}

step ruff format --check .
step ruff check .
step pyrefly check
step lint-imports --no-logo
step cargo fmt --manifest-path rustbpe/Cargo.toml --check
step cargo clippy --quiet --locked --manifest-path rustbpe/Cargo.toml --all-targets -- -D warnings
step cargo clippy --quiet --locked --manifest-path rustbpe/Cargo.toml --all-targets --features python -- -D warnings
step cargo test --quiet --locked --manifest-path rustbpe/Cargo.toml
echo "== pytest $*"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -rs "$@" # last, so that its own summary with its time is the last line
