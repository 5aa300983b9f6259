"""Run `dovetail quantize` with parsed arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import transformers

from dovetail.composition.models import find_model
from dovetail.errors import CheckpointError, ConfigError
from dovetail.facts import model_facts, read_json
from dovetail.interfaces.worker import Progress
from dovetail_quantize import layerwise
from dovetail_quantize.folder import OutputFolder, files_to_copy
from dovetail_quantize.schemes import VERSION, make_scheme
from dovetail_quantize.skeleton import Skeleton
from dovetail_quantize.texts import read_texts

OPTIONS = (
    "scheme",
    "weight_only",
    "bits",
    "group_size",
    "nearest",
    "desc_act",
    "asymmetric",
    "damp",
)


def run(args: Namespace, progress: Progress) -> int:
    """Quantize a model. Everything is checked before the output folder is created."""
    scheme = make_scheme(
        args.scheme,
        has_text=args.calibration is not None,
        weight_only=args.weight_only,
        bits=args.bits,
        group_size=args.group_size,
        nearest=args.nearest,
        desc_act=args.desc_act,
        asymmetric=args.asymmetric,
        damp=args.damp,
    )
    source = find_model(args.model, trust_remote_code=False, revision=args.revision).folder
    facts = model_facts(source)
    files_to_copy(source)
    if facts.quantization_config is not None:
        method = facts.quantization_method
        raise ConfigError(
            f"{source} is already quantized ({method}): quantize the original checkpoint instead"
        )
    if args.sample_len > facts.max_position_embeddings:
        raise ConfigError(
            f"--sample-len {args.sample_len}: the model's context is"
            f" {facts.max_position_embeddings} tokens"
        )
    texts = read_texts(
        source,
        args.calibration,
        args.evaluation,
        needed=scheme.calibrates,
        num_samples=args.num_samples,
        sample_len=args.sample_len,
        num_evaluated=args.num_evaluated,
    )
    if any(
        len(ids) and int(ids.max()) >= facts.vocab_size
        for ids in (texts.calibration, texts.evaluation)
    ):
        raise CheckpointError(
            f"{source}: its tokenizer has more tokens than the model, whose vocabulary is"
            f" {facts.vocab_size}"
        )
    skeleton = Skeleton(source)
    layerwise.check(skeleton, scheme)
    settings: dict[str, Any] = {
        **{name: getattr(args, name) for name in OPTIONS},
        "model": skeleton.checkpoint.identity(),
        "texts": texts.fingerprint,
        "dovetail-quantize": VERSION,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    folder = OutputFolder(args.out, settings, layerwise.bytes_needed(skeleton, scheme, texts))
    report = layerwise.quantize_model(skeleton, scheme, texts, folder, progress)
    report.write(folder, f"{args.model}: {args.scheme}", settings)
    config = read_json(source / "config.json")
    folder.finish({**config, "quantization_config": scheme.config(skeleton.other_linears())})
    print(
        f"{args.out}: {args.scheme}\n{report.summary()}\nreport:"
        f" {args.out / 'quantization_report.md'}"
    )
    return 0
