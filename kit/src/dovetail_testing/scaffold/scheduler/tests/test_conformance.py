"""Run the conformance test of a scheduler, in engines with requests that arrive and leave at any
time."""

from dovetail_testing.scheduler import SchedulerContract
from my_plugin import PROVIDER


class TestMyPlugin(SchedulerContract):
    provider = PROVIDER
    # options = {"my_option": 3}  # use one class per setting to test
