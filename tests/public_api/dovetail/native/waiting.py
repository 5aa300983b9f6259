from __future__ import annotations
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
log = logging.getLogger(__name__)
SPIN_COUNT = 1000
VARIABLE = 'GOMP_SPINCOUNT'
OF_USERS = (VARIABLE, 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'KMP_LIBRARY')

def spin_variables(environ: Mapping[str, str]) -> dict[str, str]:
    ...

@contextmanager
def bounded_spinning() -> Iterator[None]:
    ...
