"""What is loaded is what was exported, and what a trusted key has signed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_versions import STAGES, install
from trident_export import releases
from trident_export.errors import StoreError
from trident_export.store import commands, signing, versions
from trident_serving import artefacts, integrity, signatures
from trident_serving.errors import KeyUnusable, LoadError
from trident_serving.integrity import TRUSTED_KEYS
from trident_serving.launcher.repository_view import RepositoryView

needs_cryptography = pytest.mark.skipif(
    importlib.util.find_spec("cryptography") is None, reason="the package cryptography is not installed"
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    install(root, 1)
    return root


def test_files_as_they_were_exported(repository: Path) -> None:
    for model in ("m", *STAGES):
        integrity.check(repository / model / "1", {})
    (repository / "m_model/1/more").write_text("a note")  # nobody said what else may lie there
    integrity.check(repository / "m_model/1", {})
    integrity.check_graphs(repository / "m_tokenizer/1", {})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("m_model 2", "m_model/1/content is not the file that was exported: its SHA-256 begins with 6"),
        ("m_mod", "m_model/1/content is not the file that was exported"),
        ("", "is not the file that was exported: its SHA-256 begins with e3b0c44298fc, the manifest says "),
        (None, "m_model/1/content can't be read: No such file or directory; export the model again"),
    ],
)
def test_a_changed_file_is_refused(repository: Path, content: str | None, sentence: str) -> None:
    file = repository / "m_model/1/content"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for check, stage in ((integrity.check, "m_model"), (integrity.check_graphs, "m_tokenizer")):
        with pytest.raises(LoadError, match=sentence if content != "m_model 2" else sentence[:-2]):
            check(repository / stage / "1", {})
    integrity.check(repository / "m_tokenizer/1", {})  # the other stages are what they were


def test_a_model_without_digests_is_loaded_as_before(repository: Path) -> None:
    manifest = artefacts.read_manifest(repository, "m")
    assert manifest is not None
    dataclasses.replace(manifest, files={}).write(repository / "m/1")
    (repository / "m_model/1/content").write_text("another")
    integrity.check(repository / "m_model/1", {})
    (repository / "m/1/trident.json").unlink()
    integrity.check(repository / "m_model/1", {})


def test_verify_says_what_differs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repository", str(repository)]
    assert commands.main(["verify", *options]) == 0
    assert capsys.readouterr().out.endswith(": 7 files are as they were exported\n")
    (repository / "m_model/1/more").write_text("a note")
    assert commands.main(["verify", "m", *options]) == 1
    assert capsys.readouterr().out.endswith("m_model/1/more is not in the signed manifest: remove it\n")
    (repository / "m_model/1/more").unlink()
    (repository / "m_model/1/content").write_text("m_model 2")
    assert commands.main(["verify", "m", *options]) == 1
    assert "m_model/1/content is not the file that was exported" in capsys.readouterr().out


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    return tmp_path / "key", signing.make_keys(tmp_path / "key")


def sign(repository: Path, key: Path) -> None:
    for version in versions.of(repository, "m"):
        signing.sign(repository, version, key)


@needs_cryptography
def test_what_a_trusted_key_has_signed_is_loaded(repository: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert private.stat().st_mode & 0o777 == 0o600
    environment = {TRUSTED_KEYS: str(public)}
    with pytest.raises(LoadError, match="version 1 of m is not signed, .*: trident-export sign m"):
        integrity.check(repository / "m_model/1", environment)
    sign(repository, private)
    for model in ("m", *STAGES):
        integrity.check(repository / model / "1", environment)
    (repository / "m_model/1/more").write_text("a note")
    with pytest.raises(LoadError, match="m_model/1/more is not in the signed manifest"):
        integrity.check(repository / "m_model/1", environment)


@needs_cryptography
@pytest.mark.parametrize("damage", ["manifest", "signature", "cut", "key", "name"])
def test_what_nobody_trusted_has_signed_is_refused(repository: Path, keys: tuple[Path, Path], damage: str) -> None:
    private, public = keys
    sign(repository, private)
    manifest, signature = repository / "m/1/trident.json", repository / "m/1/trident.json.sig"
    assert len(signature.read_bytes()) == 64
    if damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"'))
    elif damage == "signature":
        signature.write_bytes(bytes(64))
    elif damage == "cut":
        signature.write_bytes(signature.read_bytes()[:63])
    elif damage == "key":
        public = signing.make_keys(private.with_name("other"))
    else:  # the signed files of another model
        for model in ("m", *STAGES):
            (repository / model).rename(repository / model.replace("m", "n", 1))
    model = "n_model" if damage == "name" else "m_model"
    sentence = (
        "is the manifest of m, not of n" if damage == "name" else "is not signed by a key that this server trusts"
    )
    with pytest.raises(LoadError, match=sentence):
        integrity.check(repository / model / "1", {TRUSTED_KEYS: str(public)})


@needs_cryptography
def test_several_keys_may_be_trusted(repository: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    other = signing.make_keys(tmp_path / "other")
    both = tmp_path / "both.pub"
    both.write_bytes(other.read_bytes() + public.read_bytes())
    sign(repository, private)
    integrity.check(repository / "m_model/1", {TRUSTED_KEYS: str(both)})
    assert len(signatures.read_keys(both)) == 2


@needs_cryptography
def test_keys_that_can_not_be_used(repository: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    for content, sentence in ((b"", "holds no public key"), (b"x-----END PUBLIC KEY-----", "no Ed25519 public key")):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(KeyUnusable, match=sentence):
            signatures.read_keys(tmp_path / "bad")
    with pytest.raises(KeyUnusable, match="can't be read: No such file"):
        signatures.read_keys(tmp_path / "none")
    with pytest.raises(StoreError, match="is there already"):
        signing.make_keys(private)
    with pytest.raises(StoreError, match="is no Ed25519 private key"):
        sign(repository, public)
    (repository / "m_model/1/content").write_text("changed")
    with pytest.raises(StoreError, match="m_model/1/content is not the file that was exported"):
        sign(repository, private)


@needs_cryptography
def test_openssl_makes_and_checks_the_same_signatures(
    repository: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    sign(repository, private)
    manifest, signature = repository / "m/1/trident.json", repository / "m/1/trident.json.sig"
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin", "-in", str(manifest)]
    done = subprocess.run([*command, "-sigfile", str(signature)], capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr
    theirs = tmp_path / "theirs"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(theirs)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(theirs), "-pubout", "-out", f"{theirs}.pub"], check=True)
    signed = ["openssl", "pkeyutl", "-sign", "-inkey", str(theirs), "-rawin", "-in", str(manifest)]
    subprocess.run([*signed, "-out", str(signature)], check=True)
    integrity.check(repository / "m_model/1", {TRUSTED_KEYS: f"{theirs}.pub"})


@needs_cryptography
def test_a_server_with_trusted_keys_sees_signed_models_with_their_signed_configs(
    repository: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    trusted = signatures.read_keys(public)
    (repository / "plain/1").mkdir(parents=True)
    view = RepositoryView(repository, tmp_path / "view", trusted)
    assert view.refresh() == []
    assert view.refused["plain"] == "it was not exported by Trident, so nobody has signed it"
    assert view.refused["m"].startswith("version 1 of m is not signed")
    sign(repository, private)
    assert view.refresh() == sorted(("m", *STAGES))
    assert list(view.refused) == ["plain"]
    kept = (repository / "m_model/1/config.pbtxt").read_text()
    (repository / "m_model/config.pbtxt").write_text(artefacts.CONFIG_HEADER + 'backend: "python"\n')
    view.refresh()
    assert (tmp_path / "view/m_model/config.pbtxt").read_text() == kept
    assert (tmp_path / "view/m_model/1/content").read_text() == "m_model 1"
    releases.pin_served("m", repository)
    install(repository, 2)
    sign(repository, private)
    commands.main(["promote", "m", "--no-server", "--repository", str(repository)])
    view.refresh()
    assert sorted(path.name for path in (tmp_path / "view/m_model").iterdir()) == ["1", "2", "config.pbtxt"]
    assert (tmp_path / "view/m_model/config.pbtxt").read_text() == (repository / "m_model/2/config.pbtxt").read_text()
    (repository / "m_model/2/config.pbtxt").write_text(kept)
    assert view.refresh() != sorted(("m", *STAGES))
    assert "m_model/2/config.pbtxt is not the file that was exported" in view.refused["m"]


def test_without_cryptography_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    for call in (lambda: signatures.read_keys(tmp_path), lambda: signing.make_keys(tmp_path / "key")):
        with pytest.raises((KeyUnusable, StoreError), match=r"pip install 'trident-serving\[signing\]'"):
            call()


def test_the_parts_of_a_model_are_listed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = artefacts.read_manifest(repository, "m")
    assert manifest is not None
    dataclasses.replace(manifest, source={"hub": "a/b"}, licences=["Apache-2.0"]).write(repository / "m/1")
    assert commands.main(["sbom", "m", "--repository", str(repository)]) == 0
    found = json.loads(capsys.readouterr().out)
    root = found["metadata"]["component"]
    assert (root["name"], root["version"]) == ("m", manifest.digest)
    assert root["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert root["properties"] == [{"name": "trident:source:hub", "value": "a/b"}]
    assert {part["name"]: part["hashes"][0]["content"] for part in found["components"]} == manifest.files
    assert commands.main(["sbom", "m", "--licences", "--repository", str(repository)]) == 0
    assert capsys.readouterr().out == f"m  {manifest.digest[:20]}  Apache-2.0\n"


def test_the_parts_of_an_environment_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["sbom"]) == 0
    text = capsys.readouterr().out
    found = {part["name"].lower(): part for part in json.loads(text)["components"]}
    assert found["numpy"]["version"] == "1.26.4"
    assert found["numpy"]["purl"] == "pkg:pypi/numpy@1.26.4"
    assert found["onnxruntime"]["licenses"] == [{"license": {"name": "MIT License"}}]
    assert found["trident-serving"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert commands.main(["sbom"]) == 0
    assert capsys.readouterr().out == text


@needs_cryptography
def test_a_trial_that_was_left_keeps_nobody_from_being_served(
    repository: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a version that nobody has signed, whose promotion was killed."""
    private, public = keys
    sign(repository, private)
    install(repository, 2)
    trial = repository / "m_model_trial"
    trial.mkdir()
    (trial / "2").symlink_to("../m_model/2", target_is_directory=True)
    text = (repository / "m_model/2/config.pbtxt").read_text()
    (trial / "config.pbtxt").write_text(artefacts.renamed(text, "m_model", "m_model_trial"))
    view = RepositoryView(repository, tmp_path / "view", signatures.read_keys(public))
    assert sorted(path.name for path in view.folder.iterdir()) == sorted(("m", *STAGES))
    assert (view.refresh(), view.refused) == (sorted(("m", *STAGES)), {})
