"""Tokenizer files, chat templates, GGUF repair, fidelity measures and the checks before a start."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny_models
from trident_export import corpora
from trident_export.errors import FidelityError
from trident_export.measure import fidelity
from trident_serving.chat.messages import parse_messages
from trident_serving.chat.template import ChatTemplate
from trident_serving.errors import InvalidRequest, LoadError, StartError
from trident_serving.generation.text_service import read_eos_token_ids
from trident_serving.launcher import preflight, server
from trident_serving.launcher.installation import find
from trident_serving.runtime.sampling.defaults import GenerationDefaults
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.schema.reading import read_parameters
from trident_serving.triton import adapter

TEMPLATE = """{% for message in messages %}
{%- if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_chat_template_equals_transformers() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "{{ 1 + 1 }} é"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(TEMPLATE, {"eos_token": tiny_models.EOS}).render(messages) == expected


def test_words_that_a_template_marks_for_training() -> None:
    """transformers' own tag, and its rendering of it."""
    template = (
        "{% for m in messages %}{% generation %}\n{% set x = m['content'] %}{{ x }};\n{% endgeneration %}{% endfor %}"
    )
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": " b"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(template, {}).render(messages) == expected == "a;\n b;\n"


def test_chat_template_that_refuses() -> None:
    with pytest.raises(InvalidRequest, match="no tools here"):
        ChatTemplate(TEMPLATE, {}).render([{"role": "tool", "content": "x"}])


def test_chat_template_can_not_reach_the_machine() -> None:
    with pytest.raises(InvalidRequest, match="refuses"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render([])


def test_messages() -> None:
    assert parse_messages('[{"role": "user", "content": "é", "name": "x"}]')[0]["content"] == "é"


def test_no_token_stands_for_more_bytes_than_the_bound() -> None:
    tokenizer = TextTokenizer(tiny_models.byte_level_tokenizer().backend_tokenizer)
    bound = tokenizer.longest_token_bytes
    assert bound is not None
    for text in [*corpora.held_out(), " " * 500, "😀" * 50]:
        assert len(tokenizer.encode(text)) * bound >= len(text.encode())


def test_smollm2_tokenizer_equals_llama_cpp(smollm2_folder: Path) -> None:
    """Ids that llama.cpp gives for the same file."""
    expected = {
        "Hello world": [19556, 905],
        "  leading spaces": [216, 2899, 5600],
        "emoji 😀 中文": [391, 33777, 40303, 218, 216, 28589, 29184],
        "It's John's, don't\tworry": [1589, 506, 2322, 506, 28, 1326, 982, 197, 103, 31998],
    }
    tokenizer = TextTokenizer.load(smollm2_folder)
    assert {text: tokenizer.encode(text) for text in expected} == expected
    for text in [*expected, "a literal ▁ stays"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert read_eos_token_ids(smollm2_folder) == {2}


@pytest.mark.parametrize(("value", "expected"), [(2, {2}), ([2, 5], {2, 5}), (None, set())])
def test_end_of_sequence_ids(tmp_path: Path, value: object, expected: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert read_eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], " must hold an object, found []"),
        ({"do_sample": True, "temperature": 200}, ": temperature must be between 0 and 100, found 200"),
        ({"do_sample": True, "temperature": "hot"}, ": temperature must be a number, found 'hot'"),
        ({"do_sample": True, "top_k": -1}, ": top_k must be 0 (off) or more, found -1"),
        ({"do_sample": True, "top_k": 1e400}, ": top_k must be a whole number, found inf"),
        ({"repetition_penalty": -1.0}, ": repetition_penalty must be above 0 and at most 100, found -1.0"),
        ({"min_new_tokens": -1}, ": min_new_tokens must be at least 0, found -1"),
        ({"no_repeat_ngram_size": True}, ": no_repeat_ngram_size must be a whole number, found True"),
        ({"bad_words_ids": [5]}, ": bad_words_ids must be lists of tokens, found [5]"),
        ({"bad_words_ids": [[]]}, ": bad_words_ids must be lists of tokens, found [[]]"),
        ({"bad_words_ids": [["a"]]}, ": bad_words_ids must be tokens by their ids, found 'a'"),
        ({"eos_token_id": "2"}, ": eos_token_id must be tokens by their ids, found '2'"),
        ({"forced_bos_token_id": 500}, " forces the token 500, the model has 500"),
        ({"forced_bos_token_id": [1, 2]}, ": forced_bos_token_id must be one token, found [1, 2]"),
    ],
)
def test_impossible_generation_configs(tmp_path: Path, config: object, sentence: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=re.escape(f"generation_config.json{sentence}")):
        GenerationDefaults.load(tmp_path, 500)


def test_a_generation_config_of_tokens_that_the_model_lacks(tmp_path: Path) -> None:
    """They never come, so they need not be forbidden; transformers passes over them, too."""
    config = {
        "eos_token_id": [2, 500],
        "suppress_tokens": [-1, 3, 500],
        "begin_suppress_tokens": [10**9],
        "bad_words_ids": [[2], [4], [4, 500], [5, 6]],
        "do_sample": True,
        "top_k": 7.0,
        "temperature": None,
        "repetition_penalty": 0,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = GenerationDefaults.load(tmp_path, 500)
    assert (found.suppress_tokens, found.begin_suppress_tokens, found.bad_words) == ((3,), (), ((4,), (5, 6)))
    assert (found.top_k, type(found.top_k), found.temperature, found.repetition_penalty) == (7, int, 1.0, 1.0)


def test_generation_settings() -> None:
    numbers = ("context", "slots", "prefill_chunk", "max_waiting", "timeout", "default_max_tokens", "threads")
    parameters = dict.fromkeys(numbers, "3")
    parameters |= {"kv_cache_mib": "0", "prefix_reuse": "true", "prompt_lookup": "false", "device": "cpu"}
    settings = read_parameters(GenerationLimits, parameters)
    assert (settings.context, settings.kv_cache_mib, settings.prefix_reuse, settings.prompt_lookup) == (
        3,
        0,
        True,
        False,
    )
    for bad in ("", "0", "-1", "x"):
        with pytest.raises(ValueError, match="'slots' must be a positive integer"):
            read_parameters(GenerationLimits, parameters | {"slots": bad})
    with pytest.raises(ValueError, match="'prefix_reuse' must be true or false, found 'yes'"):
        read_parameters(GenerationLimits, parameters | {"prefix_reuse": "yes"})


def test_divergence_equals_torch() -> None:
    random = np.random.default_rng(0)
    reference = [random.standard_normal((5, 30)).astype(np.float32), random.standard_normal((3, 30)).astype(np.float32)]
    found = [logits + 0.3 * random.standard_normal(logits.shape).astype(np.float32) for logits in reference]
    p, q = torch.tensor(np.concatenate(reference)), torch.tensor(np.concatenate(found))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    measured = fidelity.compare_logits(reference, found)
    assert measured["kl"] == pytest.approx(float(expected), rel=1e-5)
    assert measured["top1"] == float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert measured["tokens"] == 8


def test_scores_that_are_logits_are_compared_as_a_share_of_their_range() -> None:
    """A ranker has one class, so nothing but its scores can be wrong."""
    logits = [np.array([[score]], np.float32) for score in (-11.0, -3.0, 2.0, 10.0)]
    rounded = [scores + np.float32(1.7) for scores in logits]
    measured = fidelity.compare_scores(logits, rounded) | {"batch_effect": 0.0}
    assert measured["score_error"] == pytest.approx(1.7 / 21)
    fidelity.check("text-ranking", "int8", measured)
    with pytest.raises(FidelityError, match="score_error is 0.08095, must be at most 0.0001"):
        fidelity.check("text-ranking", "fp32", measured)
    for damaged in ([logits[0]] * 4, [-scores for scores in logits], [scores + np.float32(4) for scores in logits]):
        measured = fidelity.compare_scores(logits, damaged) | {"batch_effect": 0.0}
        with pytest.raises(FidelityError, match="score_error"):
            fidelity.check("text-ranking", "int8", measured)
    narrow = [scores / 100 for scores in logits]
    measured = fidelity.compare_scores(narrow, [scores / 100 for scores in rounded])
    assert measured["score_error"] == pytest.approx(1.7 / 21, rel=1e-4)
    same = fidelity.compare_scores([logits[0]] * 2, [rounded[0]] * 2)
    assert same["score_error"] == pytest.approx(1.7)


def test_the_error_of_a_probability_is_a_difference() -> None:
    expected = [np.array([[0.25, 0.75]], np.float32), np.array([[0.4, 0.6]], np.float32)]
    found = [scores + np.float32(0.1) for scores in expected]
    assert fidelity.compare_scores(expected, found)["score_error"] == pytest.approx(0.1)


def test_worst_cosine_is_the_worst() -> None:
    reference = np.eye(3, dtype=np.float32)
    found = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 2]], np.float32)
    measured = fidelity.compare_embeddings(reference, found)
    assert measured["worst_cosine"] == pytest.approx(0.8)
    assert measured["max_difference"] == pytest.approx(1.0)


def test_the_gate_says_by_how_much() -> None:
    good = {"kl": 0.01, "top1": 0.95, "tokens": 9.0, "batch_effect": 0.0}
    fidelity.check("text-generation", "int8", good)
    with pytest.raises(FidelityError, match=r"kl is 0.03, must be at most 0.02; top1 is 0.5, must be at least 0.93"):
        fidelity.check("text-generation", "int8", good | {"kl": 0.03, "top1": 0.5})
    with pytest.raises(FidelityError, match="batch_effect is 1e-06, must be at most 0"):
        fidelity.check("text-generation", "int8", good | {"batch_effect": 1e-6})
    with pytest.raises(FidelityError, match="kl is nan"):
        fidelity.check("text-generation", "int8", good | {"kl": float("nan")})
    with pytest.raises(FidelityError, match="kl is 0.01, must be at most 0.005"):
        fidelity.check("text-generation", "int8", good, {"kl": 0.005})
    with pytest.raises(FidelityError, match="there is no measure bleu; measured are kl, top1, tokens, batch_effect"):
        fidelity.check("text-generation", "int8", good, {"bleu": 1.0})


def test_the_corpus() -> None:
    texts = corpora.held_out()
    assert len(texts) >= 20
    assert sum(len(text.split()) for text in texts) > 800
    assert any("道" in text for text in texts)
    assert any("def " in text for text in texts)


def test_preflight(tmp_path: Path) -> None:
    preflight.check_python((3, 11))
    with pytest.raises(StartError, match=r"Python 3.13 is not supported: use 3.11 or 3.12"):
        preflight.check_python((3, 13))
    preflight.check_numpy("1.26.4")
    with pytest.raises(StartError, match=r"numpy 2.1.0 makes tritonserver send empty tensors"):
        preflight.check_numpy("2.1.0")
    (tmp_path / "libpython3.99.so.1.0").touch()
    assert preflight.libpython_folder(str(tmp_path), "libpython3.99.so.1.0") == tmp_path
    with pytest.raises(StartError, match=r"libpython3.98.so.1.0 was not found in .*apt install libpython"):
        preflight.libpython_folder(str(tmp_path), "libpython3.98.so.1.0")


def test_the_containers_server_comes_first(tmp_path: Path) -> None:
    for file in ("bin/tritonserver", "backends/python/triton_python_backend_stub"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("#!/bin/sh\n")
        (tmp_path / file).chmod(0o755)
    installation = find(tmp_path)
    assert installation.binary == tmp_path / "bin/tritonserver"
    assert not installation.has_native_onnxruntime
    (tmp_path / "backends/onnxruntime").mkdir()
    (tmp_path / "backends/onnxruntime/libtriton_onnxruntime.so").touch()
    assert installation.has_native_onnxruntime
    (tmp_path / "backends/python/triton_python_backend_stub").unlink()
    with pytest.raises(StartError, match="the Python backend's stub is missing"):
        find(tmp_path)
    assert "pytriton" in str(find(tmp_path / "nothing").binary)


def test_shared_memory_of_dead_launchers_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"trident-{dead.pid}-80-x", f"trident-{os.getpid()}-80-y", f"trident-{os.getpid()}-90-z", "other"):
        (tmp_path / name).touch()
    server.remove_abandoned_shared_memory(tmp_path)
    server.remove_shared_memory(f"trident-{os.getpid()}-80-", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"trident-{os.getpid()}-90-z", "other"}


def test_the_folder_of_a_model_that_is_being_completed() -> None:
    command = b"/stub\0/models/m/3/model.onnx\0shm\0"
    assert adapter.folder_to_complete(command) == Path("/models/m/3")
    with pytest.raises(RuntimeError, match="give inputs and outputs in config"):
        adapter.folder_to_complete(b"/stub\0")
