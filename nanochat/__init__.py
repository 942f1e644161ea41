"""nanochat-turbo: a full-stack ChatGPT clone with a pluggable backbone and retrieval that feeds training."""

import os

from nanochat.common import keep_freed_memory

# Before torch loads its OpenMP: let idle threads spin for some microseconds only, then sleep. On a busy machine threads
# that spin starve each other (with one of two cores taken a training step took 8 s instead of 1.1 s); on an idle one
# this costs 3 % (docs/LOG.md, 2026-11-21). GOMP_SPINCOUNT or OMP_WAIT_POLICY in the environment overrule it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if not any(name.startswith("MALLOC_") for name in os.environ):
    keep_freed_memory()
