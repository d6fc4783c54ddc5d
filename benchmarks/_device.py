"""Which device a benchmark runs on."""

from __future__ import annotations

import argparse
import sys

import torch


def device_of(args: argparse.Namespace) -> str:
    """`--device`, else "cpu" with `--tiny` and "cuda" without. Where there is no GPU the benchmark
    ends here: with an error if one was asked for, else as skipped."""
    device = args.device or ("cpu" if args.tiny else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        if args.device:
            sys.exit("error: --device cuda, but torch finds no CUDA device")
        print("skipped: this measures a CUDA GPU, and torch finds none; --tiny runs on a CPU")
        sys.exit(0)
    return device
