"""What the gateway knows of a model: its task and its limits, from the parameters of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GENERATION = "text-generation"
EMBEDDING = "feature-extraction"
HYBRID = "hybrid-embedding"
CLASSIFICATION = "text-classification"
ZERO_SHOT = "zero-shot-classification"
RANKING = "text-ranking"
ENTITIES = "token-classification"
TRANSLATION = "translation"
SPEECH = "automatic-speech-recognition"
# Triton models of an ensemble that are not for callers, by what follows the public name.
_STAGES = ("tokenizer", "preprocess", "model", "postprocess", "texts", "explain")
_ENCODER_ANSWERS = 64  # requests to an encoder at once, which its batches share


@dataclass(frozen=True)
class Model:
    """A public model.

    Attributes:
        name: as a request names it.
        task: the transformers pipeline's.
        parameters: of its config, as texts.
        tokenizer: the name of its tokenizer stage; "": it has none.
        stages: the parameters of its tokenizer stage and of what follows its graph.
        adapter: of it, that answers; "": none.
        explained: whether the server has a model that explains its answers.
    """

    name: str
    task: str
    parameters: Mapping[str, str]
    tokenizer: str = ""
    stages: Mapping[str, str] = field(default_factory=dict)
    adapter: str = ""
    explained: bool = False

    @property
    def adapters(self) -> list[str]:
        """The adapters that it has."""
        return [name for name in self.parameters.get("adapters", "").split(",") if name]

    @property
    def options(self) -> dict[str, str]:
        """What of the client's options a request for it has."""
        return {"lora_name": self.adapter} if self.adapter else {}

    @property
    def context(self) -> int | None:
        """Tokens that it takes, of a generator with the answer."""
        text = self.parameters.get("context") or self.stages.get("max_tokens")
        return int(text) if text else None

    @property
    def at_once(self) -> int:
        """Requests that a server should have of this model at once: enough that no slot waits for the gateway."""
        slots, waiting = self.parameters.get("slots"), self.parameters.get("max_waiting", "0")
        if not slots:
            return _ENCODER_ANSWERS
        return int(slots) + max(min(int(slots), int(waiting) // 2), 0)

    @property
    def labels(self) -> int:
        """Classes of a classifier; 0: unknown."""
        return int(self.stages.get("labels", "0"))

    @property
    def verified(self) -> bool:
        """Whether its export passed the gate."""
        return not self.parameters.get("unverified")


def find(known: Mapping[str, Model], name: str) -> Model | None:
    """The model that a name means: a model's own, or that of one of its adapters, `<model>:<adapter>`."""
    base, _, adapter = name.partition(":")
    found = known.get(base)
    if found is None or not adapter:
        return found if name == base else None
    return replace(found, adapter=adapter) if adapter in found.adapters else None


def catalog(parameters: Mapping[str, Mapping[str, str]]) -> dict[str, Model]:
    """The public models among those that a server has loaded, by name.

    Args:
        parameters: of the config of every Triton model.
    """
    found = {}
    for name, its in parameters.items():
        base, _, role = name.partition("_")
        if "task" not in its or (role.startswith(_STAGES) and base in parameters):
            continue
        tokenizer = f"{base}_tokenizer"
        stages = {**parameters.get(tokenizer, {}), **parameters.get(f"{base}_postprocess", {})}
        explained = f"{base}_explain" in parameters
        found[name] = Model(
            name, its["task"], its, tokenizer if tokenizer in parameters else "", stages, explained=explained
        )
    return found
