"""Versions side by side in a repository: which one is served, and each step from one to another."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trident_client import ModelStatus, NotFoundError, UnavailableError
from trident_export import cli, configs, fingerprint, models_file, releases
from trident_export.errors import StoreError
from trident_export.store import commands, rollout, versions
from trident_serving import artefacts
from trident_serving.artefacts import Manifest
from trident_serving.encoders import TASKS

STAGES = ("m_model", "m_postprocess", "m_tokenizer")


def config(model: str, limit: str = "1") -> str:
    """The config of a stage, or of an ensemble of the stages."""
    made = pb.ModelConfig(name=model)
    if model in ("m", "m_int8"):
        made.platform = "ensemble"
        for stage in STAGES:
            made.ensemble_scheduling.step.add(model_name=stage, model_version=-1)
        made.parameters["limit"].string_value = limit
    else:
        made.backend = "trident_tokenizer"
    return configs.to_text(made)


def install(repository: Path, number: int, models: tuple[str, ...] = ("m", *STAGES), name: str = "m") -> Manifest:
    """A version as an export leaves it: the first one is served."""
    for model in models:
        folder = repository / model / str(number)
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(configs.pinned_text(config(model, str(number)), number))
        if model in STAGES or model == "gen":
            (folder / "content").write_text(f"{model} {number}")
        if number == 1:
            (repository / model / "config.pbtxt").write_text(config(model, str(number)))
    files = artefacts.checksums(repository, models, str(number))
    called = {"fp32": name} | ({"int8": "m_int8"} if "m_int8" in models else {})
    manifest = Manifest(name, "text-classification", list(models), called, "f", files=files)
    manifest.write(repository / name / str(number))
    return manifest


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    install(tmp_path, 1)
    releases.pin_served("m", tmp_path)
    install(tmp_path, 2)
    return tmp_path


class Recorder:
    """Stands for a server: what it is told to load it has, as the configs say at that moment."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.loads: list[tuple[str, tuple[int, ...]]] = []
        self.trials: list[str] = []
        self.ready: dict[str, list[int]] = {}
        self.steps: dict[str, list[tuple[str, int]]] = {}
        self.refuses = ""
        for model in artefacts.loadable(repository):
            self._take(model)
        self._check()

    def _take(self, model: str) -> None:
        self.ready[model] = artefacts.served_versions(self.repository, model)
        read = text_format.Parse((self.repository / model / "config.pbtxt").read_text(), pb.ModelConfig())
        self.steps[model] = [(step.model_name, step.model_version) for step in read.ensemble_scheduling.step]

    def _check(self) -> None:
        """Each ensemble finds the versions of its stages."""
        for model in self.ready:
            assert all(number == -1 or number in self.ready[stage] for stage, number in self.steps[model]), model

    def load(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        for each in only or []:
            found = artefacts.served_versions(self.repository, each)
            if (each, max(found)) == (self.refuses, 2):
                raise UnavailableError(f"{each}: too large")
            self._take(each)
            self._check()
            self.trials += [each] * each.endswith(artefacts.TRIAL)
            self.loads += [(each, tuple(found))] * (not each.endswith(artefacts.TRIAL))
        return only or []

    def unload(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        for each in only or []:
            del self.ready[each]
            self.loads += [(each, ())] * (not each.endswith(artefacts.TRIAL))
        return only or []

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        return [
            ModelStatus(model, str(number), "READY", "") for model, numbers in self.ready.items() for number in numbers
        ]


def change(
    repository: Path,
    choose: object = versions.newer,
    server: Recorder | None = None,
    interrupt: bool = False,
) -> int:
    found = rollout.change(repository, "m", choose, server, print, interrupt=interrupt)  # type: ignore[arg-type]
    return found.number


def served(repository: Path) -> dict[str, list[int]]:
    return {model: artefacts.served_versions(repository, model) for model in ("m", *STAGES)}


def test_a_config_names_its_version_and_an_ensemble_those_of_its_stages() -> None:
    text = configs.pinned_text(config("m"), 3)
    pinned = text_format.Parse(text, pb.ModelConfig())
    assert list(pinned.version_policy.specific.versions) == [3]
    assert [step.model_version for step in pinned.ensemble_scheduling.step] == [3, 3, 3]
    assert text.startswith(artefacts.CONFIG_HEADER)
    both = text_format.Parse(artefacts.with_versions(text, [2, 3]), pb.ModelConfig())
    assert list(both.version_policy.specific.versions) == [2, 3]
    assert text == artefacts.with_versions(artefacts.with_versions(text, [2, 3]), [3])
    with pytest.raises(ValueError, match="names no version"):
        artefacts.with_versions(config("m"), [3])
    alias = pb.ModelConfig(name="m_texts", platform="ensemble")
    alias.ensemble_scheduling.step.add(model_name="m", model_version=-1)
    assert configs.pin(alias, 3).ensemble_scheduling.step[0].model_version == -1


def test_a_version_beside_another_is_not_served(repository: Path) -> None:
    assert served(repository) == {key: [1] for key in ("m", *STAGES)}
    assert artefacts.loadable(repository) == sorted(("m", *STAGES))
    assert artefacts.plain_models(repository) == []
    found = artefacts.read_manifest(repository, "m")
    assert found == artefacts.read_manifest(repository, "m", 1) != artefacts.read_manifest(repository, "m", 2)
    assert list(artefacts.read_versions(repository, "m")) == [1, 2]


def test_a_model_of_a_later_version_only_is_neither_served_nor_a_plain_one(repository: Path) -> None:
    install(repository, 3, ("m", "m_int8", *STAGES))
    assert "m_int8" not in artefacts.loadable(repository)
    assert artefacts.plain_models(repository) == []
    assert artefacts.unexported(repository) == []


def test_a_promotion_without_a_server(repository: Path) -> None:
    assert change(repository) == 2
    assert served(repository) == {key: [2] for key in ("m", *STAGES)}
    assert (repository / "m/config.pbtxt").read_text() == configs.pinned_text(config("m", "2"), 2)
    assert sorted(artefacts.read_versions(repository, "m")) == [1, 2]
    with pytest.raises(StoreError, match=r"version 2 of m is served, and there is no later one: make export MODEL=m"):
        change(repository)
    assert change(repository, versions.older) == 1
    assert (repository / "m/config.pbtxt").read_text() == configs.pinned_text(config("m", "1"), 1)
    assert sorted(artefacts.read_versions(repository, "m")) == [1, 2]
    with pytest.raises(StoreError, match="version 1 of m is served, and there is no earlier one"):
        change(repository, versions.older)


def test_the_steps_of_a_promotion(repository: Path) -> None:
    server = Recorder(repository)
    assert change(repository, server=server) == 2
    both, new = (1, 2), (2,)
    assert server.loads == [*((stage, both) for stage in STAGES), ("m", new), *((stage, new) for stage in STAGES)]
    assert server.trials == [f"{stage}_trial" for stage in STAGES]
    assert not list(repository.glob("*_trial"))
    server.loads.clear()
    assert change(repository, versions.older, server) == 1
    assert server.loads == [*((stage, both) for stage in STAGES), ("m", (1,)), *((stage, (1,)) for stage in STAGES)]


def test_variants_come_and_go(repository: Path) -> None:
    install(repository, 3, ("m", "m_int8", *STAGES))
    server = Recorder(repository)
    assert change(repository, server=server) == 3
    assert [model for model, _ in server.loads] == [*STAGES, "m_int8", "m", *STAGES]
    assert "m_int8" in artefacts.loadable(repository)
    assert sorted(artefacts.read_versions(repository, "m")) == [1, 3]  # the second one never was served
    server.loads.clear()
    assert change(repository, versions.older, server) == 1
    assert ("m_int8", ()) in server.loads
    assert "m_int8" not in artefacts.loadable(repository)
    assert not (repository / "m_int8/config.pbtxt").exists()
    assert change(repository, server=server) == 3
    assert "m_int8" in artefacts.loadable(repository)


@pytest.mark.parametrize("refuses", STAGES)
def test_what_can_not_be_loaded_is_found_before_anything_changes(repository: Path, refuses: str) -> None:
    server = Recorder(repository)
    server.refuses = f"{refuses}_trial"
    with pytest.raises(
        StoreError, match=f"the server can't load version 2 of m, and goes on with 1: {refuses}_trial: t"
    ):
        change(repository, server=server)
    assert server.loads == []
    assert sorted(server.ready) == sorted(("m", *STAGES))
    assert artefacts.loadable(repository) == sorted(("m", *STAGES))


@pytest.mark.parametrize("refuses", [*STAGES, "m"])
def test_a_server_that_does_not_take_it_goes_on_as_before(repository: Path, refuses: str) -> None:
    server = Recorder(repository)
    before = {path: path.read_text() for path in repository.glob("*/config.pbtxt")}
    server.refuses = refuses
    sentence = f"the server does not take version 2 of m, and goes on with 1: .*{refuses}: too large"
    with pytest.raises(StoreError, match=sentence):
        change(repository, server=server)
    assert {path: path.read_text() for path in repository.glob("*/config.pbtxt")} == before
    assert set(map(tuple, server.ready.values())) == {(1,)}
    assert sorted(artefacts.read_versions(repository, "m")) == [1, 2]


def test_stages_with_other_configs_change_only_if_callers_may_be_refused(repository: Path) -> None:
    kept = repository / "m_model/2/config.pbtxt"
    kept.write_text(kept.read_text().replace('backend: "trident_tokenizer"', 'backend: "onnxruntime"'))
    manifest = artefacts.read_manifest(repository, "m", 2)
    assert manifest is not None
    files = artefacts.checksums(repository, manifest.triton_models, "2")
    dataclasses.replace(manifest, files=files).write(repository / "m/2")
    server = Recorder(repository)
    with pytest.raises(StoreError, match="m_model of version 2 can't be served beside version 1: their configs differ"):
        change(repository, server=server)
    assert server.loads == []
    assert change(repository, server=server, interrupt=True) == 2
    assert server.loads == [("m", ()), *((stage, (2,)) for stage in STAGES), ("m", (2,))]
    server.loads.clear()
    server.refuses = ""
    assert change(repository, versions.older, server, interrupt=True) == 1
    server.refuses = "m_postprocess"
    with pytest.raises(StoreError, match="goes on with 1: .*m_postprocess: too large"):
        change(repository, server=server, interrupt=True)
    assert set(map(tuple, server.ready.values())) == {(1,)}
    assert sorted(server.ready) == sorted(("m", *STAGES))
    assert change(repository) == 2  # without a server nobody is interrupted


class Killed(Recorder):
    """A server whose client ends in the middle of its orders."""

    until = 0

    def load(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        if len(self.loads) == self.until:
            os._exit(0)
        return super().load(model, only=only, timeout=timeout)


@pytest.mark.parametrize("until", range(7))
def test_a_cut_promotion_leaves_what_can_be_served_and_is_gone_on_with(repository: Path, until: int) -> None:
    def second(name: str, found: list[versions.Version]) -> versions.Version:
        return versions.named(name, found, "2")

    if (child := os.fork()) == 0:
        try:
            server = Killed(repository)
            server.until = until
            change(repository, second, server)
        finally:
            os._exit(1)  # whatever happens: this copy of the test's process must not run the other tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert served(repository)["m"] == [1 if until < 3 else 2]
    server = Recorder(repository)
    assert change(repository, second, server) == 2
    assert served(repository) == {key: [2] for key in ("m", *STAGES)}
    assert set(map(tuple, server.ready.values())) == {(2,)}


class KilledInItsTrial(Recorder):
    """A server whose client ends while it tries the graph of the new version."""

    def load(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
        found = super().load(model, only=only, timeout=timeout)
        if only == ["m_model_trial"]:
            os._exit(0)
        return found


def test_what_a_killed_trial_has_left_is_removed(repository: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            change(repository, server=KilledInItsTrial(repository))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = repository / "m_model_trial"
    assert (left / "2").is_symlink()
    assert "m_model_trial" in artefacts.loadable(repository)
    server = Recorder(repository)
    assert "m_model_trial" in server.ready
    said: list[str] = []
    assert rollout.change(repository, "m", versions.newer, server, said.append).number == 2
    assert said == ["an earlier promotion was cut off: what it had left is removed (m_model_trial)"]
    assert not list(repository.glob("*_trial*"))
    assert sorted(server.ready) == sorted(("m", *STAGES))
    # The server may still have it where the folder is gone; another model's trial is not touched.
    server.ready |= {"m_tokenizer_trial": [2], "other_trial": [2]}
    server.steps |= {"m_tokenizer_trial": [], "other_trial": []}
    (repository / "other_trial").mkdir()
    assert rollout.change(repository, "m", versions.older, server, said.append).number == 1
    assert said[1:] == ["an earlier promotion was cut off: what it had left is removed (m_tokenizer_trial)"]
    assert sorted(server.ready) == sorted(("m", "other_trial", *STAGES))
    assert (repository / "other_trial").exists()


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        (b"", "but this version is not signed: trident-export sign m --key FILE"),
        (b"x" * 64, "perhaps by another key, or the manifest has changed since"),
    ],
)
def test_what_a_server_with_trusted_keys_does_not_see_is_told(repository: Path, signature: bytes, reason: str) -> None:
    class Blind(Recorder):
        def load(self, model: str, *, only: list[str] | None = None, timeout: float | None = None) -> list[str]:
            raise NotFoundError(f"the server's repository has no exported model {(only or [''])[0]!r}")

    if signature:
        (repository / "m/2/trident.json.sig").write_bytes(signature)
    with pytest.raises(StoreError) as caught:
        change(repository, server=Blind(repository))
    assert str(caught.value).startswith("the server can't load version 2 of m, and goes on with 1: the server's repos")
    assert str(caught.value).endswith(f"One with --trusted-keys has only what such a key has signed, {reason}")


def test_a_change_that_was_cut_off_while_the_server_loaded_is_gone_on_with(repository: Path) -> None:
    """The config already names the second version, and the server still has the first."""
    server = Recorder(repository)
    change(repository)
    assert (served(repository)["m"], tuple(server.ready["m"])) == ([2], (1,))
    with pytest.raises(StoreError, match="version 2 of m is served, and there is no later one"):
        change(repository, server=server)
    assert set(map(tuple, server.ready.values())) == {(2,)}
    assert change(repository, versions.older, server) == 1


def test_a_server_of_another_repository_is_not_touched(repository: Path) -> None:
    server = Recorder(repository)
    server.ready["m"] = [7]
    server.steps["m"] = []
    with pytest.raises(StoreError, match="the server has version 7 of m, this repository 1: it serves another"):
        change(repository, server=server)
    assert server.loads == []
    assert served(repository)["m"] == [1]


def test_a_damaged_version_is_not_promoted(repository: Path) -> None:
    (repository / "m_model/2/content").write_text("other")
    with pytest.raises(StoreError, match=r"m_model/2/content is not the file that was exported: version 2 can't be"):
        change(repository)
    assert served(repository)["m"] == [1]


def test_versions_are_named_by_number_or_digest(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = versions.of(repository, "m")
    assert [(version.number, version.served) for version in found] == [(1, True), (2, False)]
    assert versions.named("m", found, "2") == versions.named("m", found, found[1].short_digest) == found[1]
    for wanted in ("3", "", "abc"):
        with pytest.raises(StoreError, match=f"m has no version '{wanted}'; it has 1 \\({found[0].short_digest}\\), 2"):
            versions.named("m", found, wanted)
    options = ["--repository", str(repository)]
    assert commands.main(["versions", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["m", "1", found[0].short_digest],
        ["m", "2", found[1].short_digest],
    ]
    assert lines[0].endswith("  served")
    assert commands.main(["promote", "m", found[1].short_digest, "--no-server", *options]) == 0
    said = f"the next start of a server serves version 2 of m, {found[1].short_digest}; before it was 1\n"
    assert capsys.readouterr().err == f"trident-export: {said}"
    assert commands.main(["promote", "n", *options]) == 1
    assert "has no exported model 'n': run make export MODEL=n" in capsys.readouterr().err


def test_equal_content_has_equal_digests(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        install(tmp_path / name, 1)
    one, two = (artefacts.read_manifest(tmp_path / name, "m") for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.digest == two.digest
    assert len(one.digest) == 64
    assert set(one.files) == {*(f"{model}/config.pbtxt" for model in ("m", *STAGES)), *(f"{s}/content" for s in STAGES)}
    assert Manifest("m", "", [], {}, "").digest == ""


def test_a_version_shares_files_with_the_one_before(repository: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".staging"
    for model in STAGES:
        (staging / model / "1").mkdir(parents=True)
        (staging / model / "1/content").write_text(f"{model} {1 if model == 'm_model' else 3}")
    files = artefacts.checksums(staging, STAGES)
    releases.share(Manifest("m", "", list(STAGES), {}, "", files=files), staging, repository, 1)
    same = [(staging / model / "1/content").samefile(repository / model / "1/content") for model in STAGES]
    assert same == [True, False, False]
    assert artefacts.checksums(staging, STAGES) == files
    assert releases.next_number(repository, STAGES) == 3


def test_a_rolled_back_version_goes_when_another_is_promoted(repository: Path) -> None:
    change(repository)
    change(repository, versions.older)
    install(repository, 3)
    assert change(repository) == 3
    assert sorted(artefacts.read_versions(repository, "m")) == [1, 3]
    assert not (repository / "m_model/2").exists()


def test_an_export_of_before_is_pinned_as_it_is(tmp_path: Path) -> None:
    install(tmp_path, 1)
    for path in tmp_path.glob("*/1/config.pbtxt"):
        path.unlink()
    releases.pin_served("m", tmp_path)
    assert (tmp_path / "m/config.pbtxt").read_text() == configs.pinned_text(config("m"), 1)
    assert (tmp_path / "m/1/config.pbtxt").read_text() == configs.pinned_text(config("m"), 1)
    assert served(tmp_path)["m_model"] == [1]


@pytest.mark.parametrize("name", TASKS)
def test_every_stage_serves_both_versions_for_a_moment(name: str) -> None:
    """A stage that changed like a public model would stand before or behind graphs of another version."""
    task = TASKS[name]
    graphs = [f"model-{tower.name}" if tower.name else "model" for tower in task.graphs]
    for role in (task.stage, *graphs, *(f"{graph}_int8" for graph in graphs), "postprocess"):
        assert rollout._is_stage(f"any_{role}")
    assert not rollout._is_stage("any")
    assert not rollout._is_stage("any_int8")


def test_a_version_keeps_the_guard_of_its_table(tmp_path: Path) -> None:
    """A guard that came into the table after a second version would not be served, and nothing would say so."""
    table = {"task": "text-generation", "source": {"path": "any"}, "variants": ["fp32"], "limits": {"context": 64}}
    (plain,) = models_file.load(_written(tmp_path / "plain.toml", table))
    (guarded,) = models_file.load(_written(tmp_path / "guarded.toml", table | {"guard": "house"}))
    kept = tmp_path / "m/2/config.pbtxt"
    kept.parent.mkdir(parents=True)
    for spec, other in ((plain, guarded), (guarded, plain)):
        (config,) = configs.build(spec).values()
        kept.write_text(configs.to_text(config))
        assert configs.keeps_guard(spec, tmp_path, 2)
        assert not configs.keeps_guard(other, tmp_path, 2)


def test_a_guard_that_came_into_the_table_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The export said "m is up to date" and wrote the config."""
    table = {"task": "text-generation", "source": {"path": "any"}, "variants": ["fp32"], "limits": {"context": 64}}
    file, repository = tmp_path / "models.toml", tmp_path / "models"
    (spec,) = models_file.load(_written(file, table))
    (tmp_path / "any").mkdir()
    (graph := repository / "m/1/model.onnx").parent.mkdir(parents=True)
    graph.touch()
    manifest = Manifest(
        name="m",
        task=spec.task,
        triton_models=["m"],
        public_models={"fp32": "m"},
        fingerprint=fingerprint.fingerprint(spec, tmp_path),
    )
    manifest.write(artefacts.manifest_path(repository, "m").parent)
    configs.write(spec, repository)

    def said(command: str) -> str:
        model = ["m"] if command == "export" else []
        assert cli.main([command, *model, "--models-file", str(file), "--repository", str(repository)]) == 0
        return "".join(capfd.readouterr()).strip()

    assert said("export") == "trident-export: m is up to date"
    _written(file, table | {"guard": "house"})
    assert said("export") == (
        "trident-export: m: wrote m/config.pbtxt as models.toml says, and the rest is up to date: a running server "
        "takes it up with trident unload m and trident load m"
    )
    assert "forbidden" in (repository / "m/config.pbtxt").read_text()
    assert said("export") == "trident-export: m is up to date"
    _written(file, table)
    assert said("configs") == f"wrote {repository}/m/config.pbtxt"
    assert said("configs") == ""


def _written(file: Path, table: dict[str, object]) -> Path:
    rules = '[[guards.house.rules]]\nname = "bad"\naction = "block"\npattern = "forbidden"\n'
    lines = "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())
    file.write_text(f"[m]\n{lines}\n{rules if 'guard' in table else ''}")
    return file


def _toml(value: object) -> str:
    return (
        "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + "}"
        if isinstance(value, dict)
        else json.dumps(value)
    )
