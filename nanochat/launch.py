"""Ranks on this machine, which share the work of one script:

    python -m nanochat.launch 2 scripts.base_train configs/tiny_hybrid.py --device_batch_size=4

torchrun --standalone does the same, but follows what a rank has said with a traceback of its own. The cores are shared
out to the ranks, unless OMP_NUM_THREADS is set.
"""

import logging
import os
import signal
import sys

from nanochat.common import run_script
from nanochat.config import UserError


def main(argv: list[str]) -> None:
    """Exits as the first rank that failed did, or as what interrupted them asks for."""
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 1:
        raise UserError("expected a number of ranks and a module: python -m nanochat.launch 2 scripts.base_train ...")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(argv[0]))))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={argv[0]}", "-m", "--", *argv[1:]])
    except SignalException as e:
        raise SystemExit(128 + e.sigval) from None
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:  # else it has said why itself
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} of {argv[1]} was ended by {name}: start it again with --resume", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None


if __name__ == "__main__":
    run_script(main)
