"""Train the byte-level BPE tokenizer (4,096 entries).

Usage: train_tokenizer.py CORPUS.json OUT_FOLDER
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main(corpus, out):
    corpus = json.loads(pathlib.Path(corpus).read_text())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    entries = [q["sig"] + "\n" + q["doc"] for q in corpus["qa"]]
    sources = [s[:20000] for s in corpus["src"]]
    tokenizer.train_from_iterator(entries * 4 + corpus["texts"] + sources, trainer)
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 2048,
                "clean_up_tokenization_spaces": False,
                "pad_token": "<|pad|>",
                "eos_token": "<|end|>",
                "chat_template": CHAT_TEMPLATE,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
