"""nanochat-turbo: a full-stack ChatGPT clone with a pluggable backbone and retrieval that feeds training."""

import os

# Before torch loads its OpenMP: let idle threads sleep instead of spinning. On a busy machine spinning threads starve
# each other (with one of two cores taken a training step took 8 s instead of 1.1 s); on an idle one sleeping costs 3 %
# (docs/LOG.md, 2026-11-21). OMP_WAIT_POLICY=ACTIVE in the environment brings spinning back.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
