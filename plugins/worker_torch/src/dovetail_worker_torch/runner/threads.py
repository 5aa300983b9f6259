"""How many threads a step has on a CPU."""

from __future__ import annotations

import logging
import os

import torch

log = logging.getLogger(__name__)


def set_num_threads(asked: int | None, num_cores: int) -> None:
    """Tell torch, for the whole process: `asked`, or its own choice where that is not more than
    `num_cores`.

    torch counts the cores of the process' affinity; what a control group grants of their time may
    be less, and a step whose threads outnumber it is stopped in its middle. OMP_NUM_THREADS is the
    user's own word.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > num_cores:
        log.info(
            "steps have %d threads and not %d: a quota of CPU time",
            num_cores,
            torch.get_num_threads(),
        )
        torch.set_num_threads(num_cores)
