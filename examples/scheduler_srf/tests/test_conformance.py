"""All that this plugin needs to test: it keeps the contract of schedulers, with little ageing and
with much."""

from dovetail_scheduler_srf import PROVIDER
from dovetail_testing.scheduler import SchedulerContract


class TestSrf(SchedulerContract):
    provider = PROVIDER


class TestSrfInAHurry(SchedulerContract):
    provider = PROVIDER
    options = {"ageing": 50.0}  # noqa: RUF012
