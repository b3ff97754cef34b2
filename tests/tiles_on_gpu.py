"""The kernels for fragment-order weights run for real; scripts/gpu_check starts this program, pytest does not.

Run:    python tests/tiles_on_gpu.py STAGE [early] [pipelined]
STAGE is a name in STAGES; "cases", "clusters" and "every" are followed by the number of a part and that of parts.
With "early" every kernel begins before the one before it has ended, whatever the table says (ptq_kernels.triton.ahead);
with "pipelined" every product that can has a pipelined or a slim tile (gpu_plans.py). Every stage asserts. Without a
GPU each runs on the CPU in Triton's interpreter, in little, to try the program itself.
"""

import sys

import gpu_place
import gpu_plans
import gpu_stage_decode as decode
import gpu_stage_products as products
import gpu_stage_runs as runs
import torch

STAGES = {
    "between": decode.between,
    "cases": products.cases,
    "clusters": products.clusters,
    "chain": runs.chain,
    "every": products.every,
    "folded": products.other_tiles,
    "raised": products.other_tiles,
    "pipelined": products.other_tiles,
    "slim": products.other_tiles,
    "generate": products.generate,
    "large": products.large,
    "layouts": products.identity,
    "paths": products.paths,
    "repeat": runs.repeat,
    "streams": runs.streams,
    "graph": runs.graph,
    "eager": runs.eager,
    "compile": runs.compiled,
    "memcheck": products.memcheck,
    "permuted": products.permuted,
    "loaded": products.loaded,
}


if __name__ == "__main__":
    gpu_plans.plan_otherwise("early" in sys.argv[2:], "pipelined" in sys.argv[2:])
    STAGES[sys.argv[1]]()
    print(sys.argv[1], "passed on", torch.cuda.get_device_name() if gpu_place.ON_GPU else "the interpreter")
