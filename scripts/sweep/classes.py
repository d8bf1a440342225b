"""Which model classes the installed Transformers has that a backend can reach, read from its modules."""

import importlib
import re
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Task heads on a base model that is swept itself: their attention is the base's, to the letter.
_HEADS = re.compile(
    r"(PreTrainedModel|DecoderWrapper|For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|"
    r"MaskedLM|PreTraining|ImageClassification|NextSentencePrediction|MaskedImageModeling|AudioFrameClassification|"
    r"XVector|VideoClassification|AudioClassification|SemanticSegmentation|CTC|ImageClassificationWithTeacher|"
    r"ImageTextRetrieval|ImageAndTextRetrieval|Classification|Regression|QuestionAnsweringSimple|"
    r"TimeSeriesClassification|Pretraining|MaskGeneration|TextRecognition))$"
)
# Nothing is ever made of these; some are old names. (Vision towers may end in PretrainedModel.)
_ABSTRACT = re.compile(r"PreTrainedModel|^(PretrainedBart|BartPretrained)Model$")
# Their base model is inside them.
_GENERATING = ("ForCausalLM", "ForConditionalGeneration")


class Entry(NamedTuple):
    """One class to sweep.

    Attributes:
        module: like "transformers.models.llama.modeling_llama".
        name: of the class.
        interface: whether its file looks attention up in ALL_ATTENTION_FUNCTIONS.
        supports_backend: its own `_supports_attention_backend`.
    """

    module: str
    name: str
    interface: bool
    supports_backend: bool

    @property
    def key(self) -> str:
        """A name that is unique: some class names occur in two modules."""
        return f"{self.module.rsplit('.', 1)[1]}.{self.name}"


def load_class(entry: Entry) -> type:
    """The class itself."""
    return getattr(importlib.import_module(entry.module), entry.name)


@cache
def all_entries() -> tuple[list[Entry], dict[str, str]]:
    """Every class to sweep, and the modules that could not be imported with the reason.

    Taken are all causal language models, and of the other files that use the interface every class with attention of
    its own: base models, encoders, decoders, towers, and heads that generate.
    """
    import transformers.models
    from transformers import PreTrainedModel

    entries, broken = [], {}
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        if file.stem.startswith(("modeling_tf_", "modeling_flax_")):
            continue
        module_name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception as error:  # noqa: BLE001 - an optional dependency that is missing, whatever it raises
            broken[module_name] = f"{type(error).__name__}: {error}"
            continue
        interface = "ALL_ATTENTION_FUNCTIONS" in file.read_text()
        covered = {name.replace(head, "Model") for name in vars(module) for head in _GENERATING if name.endswith(head)}
        for name, member in vars(module).items():
            if not (isinstance(member, type) and issubclass(member, PreTrainedModel)):
                continue
            if member.__module__ != module_name or _HEADS.search(name) or _ABSTRACT.search(name) or name in covered:
                continue
            causal = name.endswith("ForCausalLM")
            backend = bool(getattr(member, "_supports_attention_backend", False))
            if (causal or interface or backend) and getattr(member, "config_class", None) is not None:
                entries.append(Entry(module_name, name, interface, backend))
    return entries, broken
