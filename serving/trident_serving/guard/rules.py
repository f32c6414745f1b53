"""Guards and their rules: tables of models.toml, and a parameter of a generator's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trident_serving.errors import ReadingError
from trident_serving.guard.patterns import Pattern, matches
from trident_serving.schema import reading

WINDOW = 400  # characters that a model is asked about at once, where a rule does not say
TEMPLATES = {"llama-guard": ("safe", "unsafe"), "granite-guardian": ("No", "Yes")}
_KINDS = ("pattern", "entities", "classifier", "judge")
_NAMES = ("user", "assistant", "policy")  # that a judge's template may use


class Action(StrEnum):
    """What a rule does with what it finds.

    block: the answer ends before it, with the finish reason `content_filter`. redact: something else stands in its
    place. annotate: nothing but a note in the response.
    """

    BLOCK = "block"
    REDACT = "redact"
    ANNOTATE = "annotate"


class Stage(StrEnum):
    """Which text a rule reads: what the request says, or what the generator answers."""

    INPUT = "input"
    OUTPUT = "output"


class OnFailure(StrEnum):
    """What happens where a rule's model can't be asked.

    closed: the request fails. open: the text passes, with a note.
    """

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True)
class Rule:
    """One thing that a guard looks for: by a pattern, or by a model that is asked.

    Attributes:
        name: of the rule, in notes and in place of what a pattern redacts.
        action: `block` ends the answer before what is found, `redact` puts something else in its place, `annotate` only
            notes it.
        stages: which texts it reads: what is asked, what is answered, or both.
        pattern: a regular expression in the syntax of Python's `re`, without look-around, references to groups, ^ and
            $.
        longest: of the pattern: characters of its longest match; 0: as the expression says.
        entities: a served model of token classification, whose entities are what is looked for.
        classifier: a served model of text classification.
        judge: a served generator with a chat template.
        labels: which entities or classes count; none: all entities. A classifier needs one at least.
        classes: of a classifier: how many it has, which the models file fills in.
        batch: of entities and a classifier: texts that it takes at once, which the models file fills in.
        threshold: the least score of an entity or a class that counts.
        replacement: what stands in place of what is redacted; none: the rule's name or the entity's label, in brackets.
        window: characters that a model is asked about at once, which an answer is held back for; 0: 400, and of a judge
            the whole text.
        template: of a judge: `llama-guard`, `granite-guardian`, or a file in Jinja with `user`, `assistant` and
            `policy`.
        policy: of a judge: what is harmful, in place of the template's own list.
        safe: of a judge with a file: the answer that lets a text pass.
        unsafe: of a judge with a file: the other answer.
    """

    name: str
    action: Action = Action.BLOCK
    stages: tuple[Stage, ...] = (Stage.INPUT, Stage.OUTPUT)
    pattern: str = ""
    longest: int = field(default=0, metadata={"least": 0})
    entities: str = ""
    classifier: str = ""
    judge: str = ""
    labels: tuple[str, ...] = ()
    classes: int = 1
    batch: int = 1
    threshold: float = 0.5
    replacement: str = ""
    window: int = field(default=0, metadata={"least": 0})
    template: str = ""
    policy: str = ""
    safe: str = ""
    unsafe: str = ""

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name)]
        if len(given) != 1:
            raise ReadingError(
                f"name must be that of one rule, with one of {', '.join(_KINDS)}, found {given or 'none'}"
            )
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise ReadingError(f"stages must be input, output or both, found {list(self.stages)}")
        if self.action is Action.REDACT and given[0] not in ("pattern", "entities"):
            raise ReadingError(f"action can't be redact: a {given[0]} says nothing of where in a text")
        if given[0] == "classifier" and not self.labels:
            raise ReadingError("labels must name the classes that count, found none")
        if not 0 < self.threshold <= 1:
            raise ReadingError(f"threshold must be above 0 and at most 1, found {self.threshold:g}")
        if self.pattern:
            self.compiled  # noqa: B018 - raises where the expression is wrong
        if self.judge:
            self.prompt_template  # noqa: B018 - raises where the template is wrong
            if not self.verdicts[0] or not self.verdicts[1] or self.verdicts[0] == self.verdicts[1]:
                raise ReadingError("safe and unsafe must be two different answers of the judge")

    @property
    def model(self) -> str:
        """The model that is asked; "": none is."""
        return self.entities or self.classifier or self.judge

    @property
    def size(self) -> int:
        """Characters that its model is asked about at once; 0: the whole text."""
        return self.window or (0 if self.judge else WINDOW)

    @cached_property
    def compiled(self) -> Pattern:
        """Its pattern."""
        return Pattern(self.pattern, self.longest)

    @property
    def verdicts(self) -> tuple[str, str]:
        """What a judge answers: safe, unsafe."""
        return TEMPLATES.get(self.template, (self.safe, self.unsafe))

    @cached_property
    def prompt_template(self) -> Any:
        """A judge's template, compiled."""
        text = self.template
        if text in TEMPLATES:
            text = resources.files("trident_serving.guard").joinpath(f"templates/{text}.jinja").read_text("utf-8")
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True)
        try:
            used = meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ReadingError(f"template is not a Jinja template: {error}") from None
        if not {"user", "assistant"} <= used <= set(_NAMES):
            raise ReadingError(f"template must use user and assistant, and may use policy, found {sorted(used)}")
        return environment.from_string(text)

    def instead(self, label: str) -> str:
        """What stands in place of something that is redacted.

        Args:
            label: what kind of thing it is.
        """
        return self.replacement or f"[{label}]"


@dataclass(frozen=True)
class Guard:
    """What is checked before and behind a generator.

    Attributes:
        name: of the guard.
        rules: in the order in which models are asked, behind all patterns.
        on_failure: what happens where a rule's model can't be asked.
        timeout: seconds that a rule's model may take for one question.
    """

    name: str
    rules: tuple[Rule, ...]
    on_failure: OnFailure = OnFailure.CLOSED
    timeout: int = 10

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        if not names or len(set(names)) < len(names):
            raise ReadingError(f"rules must be one at least, each with a name of its own, found {names}")
        for rule in self.rules:
            if rule.action is Action.REDACT and not rule.entities:
                text = rule.instead(rule.name)
                for other in self.rules:
                    if other.pattern and other.action is not Action.ANNOTATE and any(matches(other.compiled, text)):
                        raise ReadingError(
                            f"replacement {text!r} of rule {rule.name} is what rule {other.name} looks for"
                        )

    def of(self, stage: Stage) -> list[Rule]:
        """The rules that read a stage's text."""
        return [rule for rule in self.rules if stage in rule.stages]

    def hides(self, stage: Stage) -> bool:
        """Whether it may keep some of a stage's text back."""
        return any(rule.action is not Action.ANNOTATE for rule in self.of(stage))

    def as_json(self) -> str:
        """As the text of a config's parameter; what a rule does not say is left out."""
        rules = [
            {
                key: value
                for key, value in asdict(rule).items()
                if value != Rule.__dataclass_fields__[key].default or key == "name"
            }
            for rule in self.rules
        ]
        return json.dumps(asdict(self) | {"rules": rules}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Guard:
        """From the text that `as_json` gives.

        Raises:
            ReadingError: it is something else.
        """
        table = json.loads(text)
        return cls.from_table(table.pop("name"), table)

    @classmethod
    def from_table(cls, name: str, table: object) -> Guard:
        """From a table of models.toml.

        Raises:
            ReadingError: a key is unknown or missing, or has an impossible value.
        """
        where = f"guards.{name}"
        if not isinstance(table, Mapping) or not isinstance(table.get("rules"), list):
            raise ReadingError(f"{where} must be a table with a list of rules")
        rules = tuple(reading.read(Rule, rule, f"{where}.rules[{index}]") for index, rule in enumerate(table["rules"]))
        return reading.read(cls, {**table, "rules": rules, "name": name}, where)
