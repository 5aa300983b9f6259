"""Add the command `dovetail quantize`, which writes quantized checkpoints in formats of the
ecosystem.

This module imports no tensor library.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dovetail.interfaces.command import Command
from dovetail.interfaces.worker import Progress


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a plugin's model name, a local folder, or a hub id"
    )
    parser.add_argument("--scheme", required=True, metavar="NAME", help="fp8, int8, awq, gptq")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the output folder; an interrupted run in it is resumed",
    )
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a model on the hub"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration text; required by awq and gptq",
    )
    text.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help=(
            "text for the perplexity before and after (default: the windows of the calibration file"
            " that are not used for calibration)"
        ),
    )
    text.add_argument(
        "--num-samples",
        type=int,
        default=128,
        metavar="N",
        help="number of calibration windows (default 128)",
    )
    text.add_argument(
        "--sample-len", type=int, default=512, metavar="N", help="tokens per window (default 512)"
    )
    text.add_argument(
        "--num-evaluated",
        type=int,
        default=64,
        metavar="N",
        help="maximum number of windows for the perplexity (default 64)",
    )
    parser.add_argument_group("fp8").add_argument(
        "--weight-only",
        action="store_true",
        help="do not quantize activations: more accurate, slower on hardware with fast FP8",
    )
    rounding = parser.add_argument_group("group-wise 4 and 8 bits (awq, gptq)")
    rounding.add_argument("--bits", type=int, default=4, help="4 (default); gptq also 8")
    rounding.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="input channels that share a scale (default 128); -1: all",
    )
    rounding.add_argument(
        "--nearest",
        action="store_true",
        help="round to nearest (RTN): the same format without the awq or gptq algorithm",
    )
    gptq = parser.add_argument_group("gptq")
    gptq.add_argument(
        "--desc-act",
        action="store_true",
        help="quantize input channels with large activations first (act-order)",
    )
    gptq.add_argument("--asymmetric", action="store_true", help="use zero points")
    gptq.add_argument(
        "--damp",
        type=float,
        default=0.01,
        help="fraction of the Hessian's mean diagonal that is added to the diagonal (default 0.01)",
    )


def _run(args: Namespace, progress: Progress) -> int:
    from dovetail_quantize.command import run

    return run(args, progress)


QUANTIZE = Command("write a quantized checkpoint: FP8, INT8, AWQ or GPTQ", _add_arguments, _run)
