"""Write the calibration text for quantizing the demo model: pages and dialogues of its training
data.

Usage: calibration.py CORPUS.json QUESTIONS.jsonl OUT.txt

The text contains neither the held-out pages nor the entries of the question set.
"""

import json
import pathlib
import random
import sys

from train import HELD_OUT_EVERY

NUM_PAGES, PAGE_CHARS, NUM_DIALOGUES = 110, 2000, 330


def main(corpus, questions, out):
    data = json.loads(pathlib.Path(corpus).read_text())
    excluded = {
        json.loads(line)["question"] for line in pathlib.Path(questions).read_text().splitlines()
    }
    rng = random.Random(11)
    pages = [
        t for i, t in enumerate(data["texts"]) if i % HELD_OUT_EVERY and len(t) > 2 * PAGE_CHARS
    ]
    parts = []
    for page in rng.sample(pages, NUM_PAGES):
        start = page.find("\n", rng.randrange(len(page) - PAGE_CHARS)) + 1
        parts.append(page[start : start + PAGE_CHARS])
    entries = [e for e in data["qa"] if f"What does {e['name']} do?" not in excluded]
    parts += [
        f"<|user|>What does {entry['name']} do?<|end|><|assistant|>{entry['doc']}<|end|>"
        for entry in rng.sample(entries, NUM_DIALOGUES)
    ]
    rng.shuffle(parts)
    pathlib.Path(out).write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
