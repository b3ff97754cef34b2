"""The verb ``ptq merge``."""

import argparse


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``ptq merge``."""
    parser.add_argument("checkpoint", help="model directory or hub name, packed or float")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory that save_pretrained of a PEFT model wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the dense copy is written")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                        help="of the copy (default: the checkpoint's)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_merge)


def _merge(options: argparse.Namespace) -> int:
    from ptq.adapters import merge

    out = merge(
        options.checkpoint, options.adapter, options.out, dtype=options.dtype, overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(f"dense copy with the adapter: {out}")
    return 0
