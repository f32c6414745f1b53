"""A damaged folder is refused by one sentence, by `trident-export add` as by an export, before anything is built."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from trident_export import add, tasks
from trident_export.errors import ExportError, UnreadableSource
from trident_export.huggingface import chat_templates
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.huggingface.sources import check_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_causal(tmp_path_factory.mktemp("damaged") / "llama", "llama")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values if file.exists() else values))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **values)


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer_config.json", **values)


def answers(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "generation_config.json", **values)


def added_tokens(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "added_tokens.json", **values)


def words(**ids: Any) -> Callable[[Path], None]:
    """Other ids in the vocabulary."""

    def changed(folder: Path) -> None:
        state = json.loads((folder / "tokenizer.json").read_text())
        state["model"]["vocab"] |= ids
        (folder / "tokenizer.json").write_text(json.dumps(state))

    return changed


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


HALF = "\ud800"
EVERY = list(range(tiny_models.VOCABULARY))
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million layers": (
        config(num_hidden_layers=10**6),
        "num_hidden_layers 1000000, and no model has more than 10000",
    ),
    "layers without weights": (
        config(num_hidden_layers=900),
        "num_hidden_layers 900, and the weight files hold 21 t",
    ),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers 0, which must be a whole number, 1 or more"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads 0, which must be a whole number, 1 or more"),
    "a vocabulary of 10^10": (
        config(vocab_size=10**10),
        "asks for 1,280,000,061,760 numbers, and .* hold 127,296: one",
    ),
    "a million wide": (config(hidden_size=10**6), "asks for 1,989,000,000 numbers, and the weight files hold 127,296"),
    "half of a pair in a word": (
        words(**{HALF: 7}),
        r"a key in model.vocab '\\ud800', which holds half of a surrogate",
    ),
    "half of a pair in a token": (
        settings(eos_token=HALF),
        r"eos_token '\\ud800', which holds half of a surrogate pair",
    ),
    "half of a pair in a template": (
        settings(chat_template=HALF),
        r"chat_template '\\ud800', which holds half of a sur",
    ),
    "a template that is a number": (
        settings(chat_template=5),
        "has chat_template 5, which must be a text, or a list of",
    ),
    "an id beyond any": (words(e=2**40), "gives the token 'e' the id 1099511627776, which must be a whole number from"),
    "an id below any": (
        words(e=-1),
        "gives the token 'e' the id -1, which must be a whole number from 0 to 2147483647",
    ),
    "an id twice": (words(e=84), r"tokenizer.json can't be used, it gives the id 84 to .* and to "),
    "an added id beyond any": (added_tokens(x=2**40), "added_tokens.json gives the token 'x' the id 1099511627776"),
    "an added id that is a text": (
        added_tokens(x="five"),
        "added_tokens.json gives the token 'x' the id 'five', which",
    ),
    "every token suppressed": (answers(suppress_tokens=EVERY), "leaves no token in an answer but those that end it"),
    "every token ends": (answers(eos_token_id=EVERY), "leaves no token in an answer but those that end it, so every"),
    "no first token": (answers(begin_suppress_tokens=EVERY[1:]), "leaves no token at the beginning of an answer but"),
    "bytes in a template": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff") and None,
        "it is no text in UTF-8: byte 0xff at offset 0",
    ),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "there is no file with a vocabulary",
    ),
    "a template that fails": (template("{{ messages[0]['content'] }"), "the chat template can't be used .*, line 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_not_proposed(llama: Path, tmp_path: Path, name: str) -> None:
    """What refuses it is `tasks.check`, with which an export begins, too."""
    shutil.copytree(llama, tmp_path / "m")
    damage, sentence = DAMAGES[name]
    damage(tmp_path / "m")
    with pytest.raises(ExportError, match=sentence):
        add.propose(tmp_path / "m", {"path": str(tmp_path / "m")})


def test_an_export_begins_with_the_same_check(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trident_export import models_file
    from trident_export.tasks import text_generation

    monkeypatch.setattr(text_generation, "load_model", lambda source: pytest.fail("nothing is loaded"))
    shutil.copytree(llama, tmp_path / "m")
    answers(suppress_tokens=EVERY)(tmp_path / "m")
    spec = models_file.parse("m", tomllib.loads(tiny_models.causal_entry(tmp_path / "m")))
    job = tasks.Job(spec, HuggingFaceFolder(tmp_path / "m"), tmp_path / "staging", lambda message: None)
    with pytest.raises(UnreadableSource, match="leaves no token in an answer"):
        tasks.build(job)


TEMPLATES = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "not done after 1 seconds of a",
    "{% for i in range(10 ** 12) %}x{% endfor %}": "it counts too far: Range too big",
    "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}": "it takes more than 1024 MiB",
    "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}": "it writes 9899901 characters for a short conversation",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}": "calls itself without an end",
    "{% if messages | length > 1 %}{{ 'x' * 10 ** 10 }}{% endif %}": "it takes more than 1024 MiB",
    "{{ '\\ud800' }}": "it writes half of a surrogate pair",
    "{{ raise_exception('no messages') }}": "refuses them: no messages|no messages",
}


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_has_bounds(text: str) -> None:
    with pytest.raises(
        UnreadableSource, match=rf"m: the chat template can't be used \(.*({TEMPLATES[text]}).*\): mend it"
    ):
        chat_templates.check("m", text, {}, seconds=1)


def test_a_template_may_refuse_a_system_message() -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    chat_templates.check("m", text, {"bos_token": "<s>"})


def test_missing_weights_are_told_from_their_list(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    check_weights(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableSource, match="model-00002-of-00002.safetensors, which model.safetensors.index.json"):
        check_weights(tmp_path / "m")
    for file in (tmp_path / "m").glob("model*"):
        file.unlink()
    with pytest.raises(UnreadableSource, match=r"there are no weights \(\*.safetensors, pytorch_model\*.bin\)"):
        check_weights(tmp_path / "m")
