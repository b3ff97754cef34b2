"""What is compared."""

from typing import NamedTuple

from benchmarks.whole_model.checkpoints import Packing

PTQ, LLAMA_CPP = "ptq", "llama.cpp"


class Row(NamedTuple):
    """One way to run a model of a shape."""

    name: str
    kind: str
    model: str  # file or directory of the weights
    packing: Packing | None = None
    compiled: bool = False  # the decoding step, by torch.compile
    head_bits: int | None = None  # of a head that is in float on disk
    flash_attention: bool = False  # of llama.cpp


ROWS = (
    Row("bf16", PTQ, "bf16"),
    Row("4-bit g128", PTQ, "g128", Packing(128, head=False)),
    Row("4-bit g128 compiled", PTQ, "g128", Packing(128, head=False), compiled=True),
    Row("4-bit g128 and head compiled", PTQ, "g128", Packing(128, head=False), compiled=True, head_bits=4),
    # The bits of Q4_0 in every matrix but the embedding: the closest to llama.cpp's file.
    Row("4-bit g32 and head", PTQ, "g32-head", Packing(32, head=True)),
    Row("4-bit g32 and head compiled", PTQ, "g32-head", Packing(32, head=True), compiled=True),
    Row("llama.cpp Q4_0", LLAMA_CPP, "q4_0.gguf"),
    Row("llama.cpp Q4_0 flash attention", LLAMA_CPP, "q4_0.gguf", flash_attention=True),
)
