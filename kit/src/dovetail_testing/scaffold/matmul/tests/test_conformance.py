"""All the test that products need: every format declared, any number of rows, rounded inputs, and
memory."""

from dovetail_testing.matmul import MatmulContract
from my_plugin import PROVIDER


class TestMyPlugin(MatmulContract):
    provider = PROVIDER
