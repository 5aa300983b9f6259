from __future__ import annotations
import json
import math
import struct
from pathlib import Path
from typing import Any
from dovetail.facts import ModelFacts, model_facts
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.model import ModelSource
from dovetail_testing.contract import Contract, common_causes
BITS = {'F64': 64, 'F32': 32, 'F16': 16, 'BF16': 16, 'I64': 64, 'I32': 32, 'I16': 16, 'I8': 8, 'U8': 8, 'BOOL': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'U64': 64, 'U32': 32, 'U16': 16, 'F8_E8M0': 8, 'F4': 4}
UNSAFE = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
TEXTS = ('', 'Hello, world!', 'def f(x):\n    return x ** 2\n', 'naïve — 漢字 🙂', 'a' * 300)

class ModelContract(Contract):
    extension_point = 'model'

    @property
    def source(self) -> ModelSource:
        ...

    @property
    def facts(self) -> ModelFacts:
        ...

    @common_causes('the path is relative', 'the wheel lacks the package data', 'the licence of the weights is not stated')
    def test_declaration(self) -> None:
        ...

    @common_causes('config.json omits a key for which transformers has a default')
    def test_the_config_says_what_is_asked(self) -> None:
        ...

    @common_causes('a file was truncated when the package was built', 'an index names files that do not exist')
    def test_the_weights_are_whole(self) -> None:
        ...

    @common_causes('a normalizer changes the text', 'tokenizer.json has no decoder')
    def test_the_tokenizer_keeps_texts(self) -> None:
        ...

def tensors_of(file: Path) -> dict[str, Any]:
    ...
