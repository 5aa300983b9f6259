"""The core's own plugin keeps the contracts that every plugin keeps."""

from __future__ import annotations

from typing import Any, ClassVar

from dovetail.assembly.builtins import dovetail_kv_caches, dovetail_schedulers
from dovetail_testing.kv_cache import KVCacheContract
from dovetail_testing.scheduler import SchedulerContract

FCFS, PRIORITY, LONGEST_PREFIX = dovetail_schedulers()
(PAGED,) = dovetail_kv_caches()


class TestFcfs(SchedulerContract):
    provider = FCFS


class TestPriority(SchedulerContract):
    provider = PRIORITY


class TestLongestPrefix(SchedulerContract):
    provider = LONGEST_PREFIX


class TestLongestPrefixWithoutPatience(SchedulerContract):
    provider = LONGEST_PREFIX
    options: ClassVar[dict[str, Any]] = {"max_overtaken": 0}


class TestPaged(KVCacheContract):
    provider = PAGED
