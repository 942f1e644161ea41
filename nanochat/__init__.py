"""nanochat-turbo: a full-stack ChatGPT clone with a pluggable backbone and retrieval that feeds training."""

import contextlib
import ctypes
import os
import platform

# Before torch loads its OpenMP: let idle threads spin for some microseconds only, then sleep. On a busy machine threads
# that spin starve each other (with one of two cores taken a training step took 8 s instead of 1.1 s); on an idle one
# this costs 3 % (docs/LOG.md, 2026-11-21). GOMP_SPINCOUNT or OMP_WAIT_POLICY in the environment overrule it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Freed memory stays with the process: glibc otherwise gives large blocks back to the kernel and faults them in again,
# page by page, at the next step (19,000 faults a step at depth 4; 3 % of its time, docs/LOG.md).
if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
