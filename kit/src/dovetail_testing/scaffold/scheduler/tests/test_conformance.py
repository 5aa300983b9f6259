"""All the test that a scheduler needs: the contract, against engines that come and go as they
like."""

from dovetail_testing.scheduler import SchedulerContract
from my_plugin import PROVIDER


class TestMyPlugin(SchedulerContract):
    provider = PROVIDER
    # options = {"my_option": 3}  # a class for each setting that is worth a test
