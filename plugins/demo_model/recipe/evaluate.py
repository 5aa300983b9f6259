"""Write the question set and score a model on it.

Usage: evaluate.py CORPUS.json MODEL_FOLDER questions OUT.jsonl
       evaluate.py CORPUS.json MODEL_FOLDER held-out OUT.txt
       evaluate.py CORPUS.json MODEL_FOLDER score QUESTIONS.jsonl
       evaluate.py CORPUS.json MODEL_FOLDER perplexity HELD_OUT.txt

questions: 300 short entries, with the reference answer. held-out: documentation pages that were
never trained on. score: exact and prefix accuracy, greedy. perplexity: of the first 64 windows of
512 tokens. The last two do not read CORPUS.json (any word will do).
"""

import json
import pathlib
import random
import sys

import torch
from train import HELD_OUT_EVERY, SHORT, held_out_perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return AutoTokenizer.from_pretrained(folder), model


def score(folder, questions):
    tokenizer, model = load(folder)
    exact = first = 0
    for q in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": q["question"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        out = model.generate(ids, max_new_tokens=160, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        exact += text.strip() == q["answer"].strip()
        first += text.strip()[:40] == q["answer"].strip()[:40]
    return exact / len(questions), first / len(questions)


def main(corpus, folder, what, path):
    path = pathlib.Path(path)
    if what == "score":
        questions = [json.loads(line) for line in path.read_text().splitlines()]
        print("exact {:.3f}  first 40 characters {:.3f}".format(*score(folder, questions)))
        return
    if what == "perplexity":
        tokenizer, model = load(folder)
        tokens = tokenizer(path.read_text())["input_ids"]
        print(f"held-out perplexity {held_out_perplexity(model, tokens, 512, 'cpu'):.2f}")
        return
    data = json.loads(pathlib.Path(corpus).read_text())
    if what == "held-out":
        path.write_text("\n\n".join(data["texts"][::HELD_OUT_EVERY]))
        return
    rng = random.Random(7)
    names = {}
    for entry in data["qa"]:
        names.setdefault(entry["name"], entry)
    picked = rng.sample([e for e in names.values() if len(e["doc"]) in SHORT], 300)
    path.write_text(
        "".join(
            json.dumps({"question": f"What does {e['name']} do?", "answer": e["doc"]}) + "\n"
            for e in picked
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
