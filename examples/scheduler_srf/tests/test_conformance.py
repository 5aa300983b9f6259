"""The plugin's only test: it fulfils the scheduler contract, with little and with much ageing."""

from dovetail_scheduler_srf import PROVIDER
from dovetail_testing.scheduler import SchedulerContract


class TestSrf(SchedulerContract):
    provider = PROVIDER


class TestSrfInAHurry(SchedulerContract):
    provider = PROVIDER
    options = {"ageing": 50.0}  # noqa: RUF012
