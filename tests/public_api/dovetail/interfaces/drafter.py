from __future__ import annotations
from dataclasses import dataclass
from typing import Literal, Protocol
from dovetail.sequence import Sequence

@dataclass(frozen=True)
class DrafterCapabilities:
    runs_in: Literal['engine', 'worker'] = 'engine'
    learns_from_other_requests: bool = False

class Drafter(Protocol):

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        ...

    def forget(self, seq_id: int) -> None:
        ...
CONTRACT = '0.1'
