"""What a GGUF file says of a tokenizer, and which tokenizers llama.cpp would not follow.

Oracle: hand-made tokenizers, of which it is known by hand what llama.cpp makes of them.
"""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptq.affixes import around
from ptq.errors import UnsupportedModelError
from ptq.gguf.tokens import tokenizer_keys, tokenizer_notes
from ptq.gguf.words import MARK, PATTERNS


def byte_level(
    pre: object, normalizer: object = None, around: str = "$A", model: object = None, **extra: object
) -> PreTrainedTokenizerFast:
    """``around`` says what the post-processor puts where; ``model`` has other settings of the BPE."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"th": 256, "the": 257}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")], **(model or {})))
    built.pre_tokenizer, built.normalizer = pre, normalizer
    built.add_special_tokens(["<s>", "</s>"])
    built.add_tokens(["plain"])
    named = [(token, built.token_to_id(token)) for token in ("<s>", "</s>")]
    built.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=built, **{"bos_token": "<s>", "eos_token": "</s>", **extra})


def plain_words() -> pre_tokenizers.PreTokenizer:
    """GPT-2's way of cutting them."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated", False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def test_a_byte_level_tokenizer():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), chat_template="{{ messages }}")
    keys = tokenizer_keys(tokenizer, 264)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert keys["tokenizer.ggml.tokens"][256:] == [
        "th",
        "the",
        "<s>",
        "</s>",
        "plain",
        "[PAD261]",
        "[PAD262]",
        "[PAD263]",
    ]
    assert keys["tokenizer.ggml.token_type"][256:] == [1, 1, 3, 3, 4, 5, 5, 5]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (258, 259)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("template", "kept"), [
    ({"default": "a", "tool use": "b", "rag": "c"},
     {"": "a", ".tool_use": "b", ".rag": "c", "s": ["tool_use", "rag"]}),
    ({"default": "a"}, {"": "a"}),
    ({"rag": "c", "": "d"}, {".rag": "c", "s": ["rag"]}),
    ({"a-b": "c", "a_b": "d"}, {".a_b": "c", ".a_b_": "d", "s": ["a_b", "a_b_"]}),
    (None, {}),
])  # fmt: skip
def test_chat_templates_by_name(template, kept):
    """As gguf-py's `GGUFWriter.add_chat_template` has them."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), chat_template=template)
    keys = {key: value for key, value in tokenizer_keys(tokenizer, 264).items() if "chat_template" in key}
    assert keys == {f"tokenizer.chat_template{end}": value for end, value in kept.items()}


# Each pattern must cut this as llama.cpp's regular expression of that name does; the recorded pieces are those.
PIECES = {
    "llama-bpe": ["It", "'s", " ", "123", "45", " OK", "!\n"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " OK", "!\n"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " OK", "!\n"],
}


@pytest.mark.parametrize(("pattern", "name"), PATTERNS.items())
def test_ways_of_cutting_words_have_names(pattern, name):
    tokenizer = byte_level(split(pattern), normalizers.NFC())
    assert tokenizer_keys(tokenizer, 261)["tokenizer.ggml.pre"] == name
    cut = pre_tokenizers.Split(Regex(pattern), "isolated", False).pre_tokenize_str("It's 12345 OK!\n")
    assert [piece for piece, _ in cut] == PIECES[name]


@pytest.mark.parametrize(
    ("around", "bos", "eos"), [("$A", False, False), ("<s> $A", True, False), ("<s> $A </s>", True, True)]
)
def test_what_stands_around_a_text(around, bos, eos):
    keys = tokenizer_keys(byte_level(plain_words(), around=around), 261)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (bos, eos)


@pytest.mark.parametrize("unknown", [None, "</s>"])
def test_a_vocabulary_of_few_letters(unknown):
    """It has no "a", which becomes nothing, or the end mark where that stands for what is unknown."""
    built = Tokenizer(models.BPE(vocab={"C": 0, "G": 1, "</s>": 2}, merges=[], unk_token=unknown))
    built.pre_tokenizer = plain_words()
    built.add_special_tokens(["</s>"])
    names = dict.fromkeys(("bos_token", "eos_token"), "</s>") | ({"unk_token": unknown} if unknown else {})
    keys = tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=built, **names), 3)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("<s> $A </s>", "<s>", ([1], [2])),
        ("$A </s>", None, ([], [2])),  # <s> is a text then, and known
        ("$A </s>", "<s>", ([], [])),
        ("$A", "<s>", ([], [])),
    ],
)
def test_what_stands_around_a_text_of_unknown_letters(template, bos, expected):
    """Oracle: the template. Where no token says where a text would be, an end mark is none of its beginning."""
    built = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token=bos, eos_token="</s>")
    assert around(tokenizer, tokenizer.all_special_ids) == expected


class Shifting:
    """Its tokens of a text are others with special ones around; counts the texts that it saw."""

    def __init__(self, bos):
        self.bos_token_id, self.seen = bos, 0

    def get_vocab(self):
        return {str(index): index for index in range(5000)}

    def decode(self, ids):
        return str(ids[0])

    def __call__(self, text, add_special_tokens=True):
        self.seen += 1
        return {"input_ids": [1, 6, 2] if add_special_tokens else [5]}


def test_what_stands_around_a_text_is_not_sought_in_all_of_a_vocabulary():
    tokenizer = Shifting(1)
    assert around(tokenizer, [1, 2]) == ([1], [6, 2])
    assert tokenizer.seen == 2001, "two for each of 1000 texts, and one for none"
    assert around(Shifting(None), [1, 2]) == ([], [])


def test_a_byte_level_tokenizer_has_no_unknown_token():
    """No letter is unknown to its bytes; GPT-2 names its end mark so, and SmolLM2 a control token of its own."""
    for unknown in ("</s>", "<|endoftext|>"):
        tokenizer = byte_level(plain_words())
        tokenizer.add_special_tokens({"unk_token": unknown})
        kinds = tokenizer_keys(tokenizer, 262)["tokenizer.ggml.token_type"]
        assert kinds[258:] == [3, 3, 4, 3 if unknown == "<|endoftext|>" else 5]


@pytest.mark.parametrize(("other", "kind"), [("bos", 3), ("eos", 3), ("pad", 2)])
def test_an_end_mark_that_stands_for_unknown_pieces_is_none(other, kind):
    """Many pad with their unknown token, as tunes of Llama 2 do."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.model.unk_token = None
    setattr(tokenizer, f"{other}_token", "<unk>")
    keys = tokenizer_keys(tokenizer, 265)
    assert keys["tokenizer.ggml.token_type"][:3] == [kind, 3, 3]
    assert keys["tokenizer.ggml.unknown_token_id"] == 0


def test_a_vocabulary_of_no_text():
    built = Tokenizer(models.BPE(vocab={"</s>": 0}, merges=[]))
    built.pre_tokenizer = plain_words()
    built.add_special_tokens(["</s>"])
    keys = tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>"), 1)
    assert keys["tokenizer.ggml.add_eos_token"] is False


def test_the_tokenizers_own_special_tokens_come_first():
    tokenizer = byte_level(plain_words(), eos_token=None)
    keys = tokenizer_keys(tokenizer, 261, {"bos": 7, "eos": 8, "pad": 9})
    found = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert found == [258, 8, 9]


def test_fillers_have_texts_of_their_own():
    tokenizer = byte_level(plain_words())
    tokenizer.add_tokens(["[PAD262]", "[PAD263]"])
    assert tokenizer_keys(tokenizer, 265)["tokenizer.ggml.tokens"][260:] == [
        "plain", "[PAD262]", "[PAD263]", "[PAD263]_", "[PAD264]",
    ]  # fmt: skip


def whole_words(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool, reachable: bool) -> PreTrainedTokenizerFast:
    """With or without a token that no merge makes."""
    spec = json.loads(byte_level(pre).backend_tokenizer.to_str())
    spec["model"]["ignore_merges"] = ignore_merges
    if not reachable:
        spec["model"]["vocab"]["Ġox"] = 261
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


LLAMA_BPE = next(pattern for pattern, name in PATTERNS.items() if name == "llama-bpe")


@pytest.mark.parametrize("ignore_merges", [True, False])
@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize(("name", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_words_that_are_tokens(name, whole, reachable, ignore_merges):
    """llama.cpp takes them whole, or joins them by merges, whatever tokenizer.json says."""
    pre = split(LLAMA_BPE) if name == "llama-bpe" else plain_words()
    tokenizer = whole_words(pre, ignore_merges, reachable)
    if reachable or ignore_merges == whole:
        assert tokenizer_keys(tokenizer, 262)["tokenizer.ggml.pre"] == name
    else:
        with pytest.raises(UnsupportedModelError, match=rf"llama.cpp's {name} takes .* and of ' ox' the pieces differ"):
            tokenizer_keys(tokenizer, 262)


def test_digits_one_by_one_have_a_name():
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert tokenizer_keys(byte_level(pre_tokenizers.Sequence(steps)), 261)["tokenizer.ggml.pre"] == "smollm"


def sentencepiece(**changes: object) -> PreTrainedTokenizerFast:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        MARK,
        "a",
        "b",
        f"{MARK}a",
        "ab",
        f"{MARK}ab",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [(MARK, "a"), ("a", "b"), (f"{MARK}a", "b")]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    for name, value in changes.items():
        setattr(built, name, value)
    built.decoder = decoders.ByteFallback()
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_sentencepiece_tokenizer(unknown):
    """The model inside the LlamaTokenizer of transformers 5 names no unknown token."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.model.unk_token = unknown
    keys = tokenizer_keys(tokenizer, 265)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 6]
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    # only what merges make has a rank
    assert keys["tokenizer.ggml.scores"][-6:] == [-3.0, -3.0, -3.0, 0.0, -1.0, -2.0]


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("never", False)])
def test_a_metaspace_says_whether_a_space_comes_first(scheme, prefix):
    tokenizer = sentencepiece(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme))
    assert tokenizer_keys(tokenizer, 265)["tokenizer.ggml.add_space_prefix"] is prefix


def spaces_replaced() -> normalizers.Normalizer:
    return normalizers.Replace(" ", MARK)


def test_a_cut_at_spaces_that_are_gone_changes_nothing():
    """As Gemma's tokenizer has it."""
    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    keys = tokenizer_keys(sentencepiece(normalizer=spaces_replaced(), pre_tokenizer=cut), 265)
    assert keys["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"normalizer": spaces_replaced()}, None),
        ({"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never")}, None),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, None),
        ({"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace()}, "before a text that begins with one, this"),
        ({"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
         "before a text that begins with one or follows a special token, this"),
    ],
)  # fmt: skip
def test_another_space_before_a_text_is_noted(changes, note):
    """Oracle: how many marks the tokenizer puts before a letter behind a space, and behind a special token."""
    tokenizer = sentencepiece(**changes)
    prefix = tokenizer_keys(tokenizer, 265)["tokenizer.ggml.add_space_prefix"]
    begins, follows = (tokenizer.tokenize(text) for text in (" b", "<s>b"))
    same = (begins.count(MARK) == 1 + prefix, follows.count(MARK) == prefix)
    assert same == (note is None, note is None or "follows" not in note)
    assert [note in each for each in tokenizer_notes(tokenizer)] == ([] if note is None else [True])


def test_byte_level_tokenizers_put_no_space_before_a_text():
    assert tokenizer_notes(byte_level(plain_words())) == ()


def across_spaces(as_text: bool) -> PreTrainedTokenizerFast:
    """A merge that a Metaspace which cuts at spaces never does; older files have merges as text."""
    spec = json.loads(
        sentencepiece(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace()).backend_tokenizer.to_str()
    )
    spec["model"]["vocab"][MARK * 2] = 265
    spec["model"]["merges"].append([MARK, MARK])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    if not as_text:
        return tokenizer
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(spec)))


SUFFIX = {"end_of_word_suffix": "</w>"}
DIGITS = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "rows", "message"),
    [
        (byte_level(pre_tokenizers.Whitespace()), 261, "cut words in a way llama.cpp has a name for"),
        (byte_level(split(r"\s+")), 261, "cut words in a way llama.cpp has a name for"),
        (byte_level(pre_tokenizers.ByteLevel(False), normalizers.Lowercase()), 261, "this tokenizer applies Lowercase"),
        (byte_level(pre_tokenizers.ByteLevel(False)), 260, "goes up to 260, the embedding has 260 rows"),
        (byte_level(DIGITS), 261, "cut words in a way llama.cpp has a name for"),
        (byte_level(plain_words(), model=SUFFIX), 261, "this tokenizer has the end_of_word_suffix '</w>'"),
        (byte_level(plain_words(), around="</s> <s> $A"), 261, "before a text; this tokenizer puts </s> <s> there"),
        (byte_level(plain_words(), around="</s> $A"), 261, "puts </s> there, and its bos token is <s>: use"),
        (byte_level(plain_words(), around="$A <s>"), 261, "but the eos token after a text; .* puts <s> there"),
        (sentencepiece(pre_tokenizer=pre_tokenizers.Digits()), 265, "this one applies Digits"),
        (sentencepiece(normalizer=normalizers.Prepend(MARK)), 265, f"turns spaces into {MARK}; no step of this one"),
        (sentencepiece(normalizer=None), 265, f"turns spaces into {MARK}; no step of this one"),
        (across_spaces(False), 266, f"never makes its piece '{MARK}{MARK}'"),
        (across_spaces(True), 266, f"never makes its piece '{MARK}{MARK}'"),
        (
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
            1,
            "model's is WordLevel",
        ),
        (SimpleNamespace(), 1, "needs a fast tokenizer"),
    ],
)
def test_tokenizers_without_a_counterpart_are_refused(tokenizer, rows, message):
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer_keys(tokenizer, rows)
