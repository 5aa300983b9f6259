"""Select Triton's interpreter, before any kernel is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
