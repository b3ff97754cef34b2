"""Which of transformers' classes a checkpoint is of, and what a class can be used for."""

import copy
import inspect
from typing import Any

import torch

from ptq.errors import UnsupportedModelError
from ptq.models.names import tied_names


def model_of(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model of the class that a checkpoint names, be it a classifier's; where it names none, a causal or vision one.

    Raises:
        ValueError: transformers has none.
    """
    import transformers
    from transformers import AutoModel

    known = [auto for auto in _autos() if type(config) in auto._model_mapping]
    named = list(getattr(config, "architectures", None) or ())
    fitting = [auto for auto in known if auto._model_mapping[type(config)].__name__ in named]
    classes = [getattr(transformers, name) for name in named if hasattr(transformers, name)]
    own = [each for each in classes if isinstance(config, getattr(each, "config_class", None) or ())]
    model = own[0]._from_config(config, dtype=dtype) if own and not fitting else None
    if model is None and not known and getattr(config, "is_encoder_decoder", False):
        raise ValueError("its decoder reads what an encoder makes of another text, which no causal model does")
    if model is not None and (not known or AutoModel._model_mapping.get(type(config), None) is not type(model)):
        return model
    auto = next(iter(fitting or known), _autos()[0])
    # A copy beside a model: some classes of decoders write into the configuration that they share with their encoder.
    given = config if model is None else copy.deepcopy(config)
    causal = auto.from_config(given, dtype=dtype, trust_remote_code=trust_remote_code)
    return causal if model is None or _same_tensors(causal, model) else model


def _autos() -> tuple[Any, Any]:
    """transformers' lists of causal and vision-language classes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM, AutoModelForImageTextToText


def _same_tensors(causal: Any, base: Any) -> bool:
    """Whether a language model is made of what a file of its base model has: its head is the embedding."""
    tied = tied_names(causal)
    whole = {name for name, _ in causal.named_parameters() if name not in tied}
    return whole == {f"{causal.base_model_prefix}.{name}" for name, _ in base.named_parameters()}


def auto_class(name: str) -> str:
    """The Auto class of transformers that makes models of the class with this name; AutoModel where no other does."""
    import transformers

    for task in ("ImageTextToText", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
                 "MaskedLM", "Seq2SeqLM", "SpeechSeq2Seq", "MultimodalLM"):  # fmt: skip
        auto = getattr(transformers, f"AutoModelFor{task}", None)
        if auto is not None and name in auto._model_mapping._model_mapping.values():
            return f"AutoModelFor{task}"
    return "AutoModel"


def predicts_text(model: Any) -> bool:
    """Whether what a model puts out are logits of the next token: no classifier's, and none of masked tokens."""
    from transformers import AutoModelForMaskedLM, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return True  # code of its own, asked for as a causal model
    kind, config = type(model), type(model.config)
    if any(auto._model_mapping.get(config, None) is kind for auto in _autos()):
        return True
    masked = AutoModelForMaskedLM._model_mapping.get(config, None) is kind
    if masked or getattr(model.config, "is_encoder_decoder", False):
        return False
    return model.get_output_embeddings() is not None


def require_prediction(model: Any, what: str) -> None:
    """Raise UnsupportedModelError for a model that does not predict text, which ``what`` needs."""
    if not predicts_text(model):
        raise UnsupportedModelError(
            f"{what} needs a model that predicts the next token; config.json names {type(model).__name__}, which does "
            "not: load it with ptq.load, and use it for what it was made for"
        )


def require_text_alone(model: Any) -> None:
    """Whether a model can be run block by block: token ids are all that it is given.

    Raises:
        UnsupportedModelError: it has an encoder for something else, or cannot be called without another input.
    """
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not predicts_text(model)
    parameters = [*inspect.signature(model.forward).parameters.values()]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    wanted = [each.name for each in parameters if each.kind in plain and each.default is inspect.Parameter.empty]
    wanted = [name for name in wanted if name != "input_ids"]
    if encodes or not any(each.name == "input_ids" or each.kind is each.VAR_POSITIONAL for each in parameters):
        wanted = ["what its encoder reads"]
    if wanted:
        raise UnsupportedModelError(
            f"a model must run on text alone to be run block by block; {type(model).__name__} needs {wanted[0]}: "
            "quantize it in memory with ptq.quantize_linears, on batches that have all it needs"
        )
