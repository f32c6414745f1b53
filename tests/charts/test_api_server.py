"""The chart in a real API server: `make charts KUBERNETES_PROGRAMS=folder KUBERNETES_CRDS=folder`.

The first has `kube-apiserver` and `etcd`, the second the YAML of the custom resources: KServe's ServingRuntime and
InferenceService, KEDA's ScaledObject, the Gateway API's HTTPRoute and GRPCRoute, and the Prometheus operator's
ServiceMonitor. There is no controller and no node: objects are checked, admitted and stored, and no pod runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CASES, CHART, manifests, pods
from trident_serving.launcher.local import free_ports

PROGRAMS, CRDS = os.environ.get("KUBERNETES_PROGRAMS", ""), os.environ.get("KUBERNETES_CRDS", "")
pytestmark = [
    pytest.mark.charts,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (PROGRAMS and CRDS),
        reason="KUBERNETES_PROGRAMS and KUBERNETES_CRDS name no kube-apiserver, etcd and custom resources",
    ),
]
NAMESPACE = "serving"
START_SECONDS = 90.0
# So much a namespace can ask of its pods: Kubernetes's strictest profile.
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}


@dataclass(frozen=True)
class Cluster:
    """An API server that answers."""

    tools: Path
    settings: Path

    def run(self, program: str, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(self.tools / program), *words]
        environment = {**os.environ, "KUBECONFIG": str(self.settings), "HOME": str(self.settings.parent)}
        return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints.

        Raises:
            AssertionError: it failed.
        """
        done = self.run("kubectl", *words, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def create(self, item: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("kubectl", "create", "--filename=-", *words, given=json.dumps(item))


@pytest.fixture(scope="module")
def cluster(tools: Path, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    port, client_port, peer_port = free_ports(3)
    (folder / "tokens.csv").write_text('token,admin,1,"system:masters"\n')
    settings = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "clusters": [
            {"name": "c", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": "u", "user": {"token": "token"}}],
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    stores, peers = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    etcd = [f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={stores}", f"--advertise-client-urls={stores}"]
    etcd += [
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
    ]
    server = [f"--etcd-servers={stores}", "--bind-address=127.0.0.1", f"--secure-port={port}"]
    server += [f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}"]
    server += ["--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24"]
    server += [f"--service-account-key-file={certificates / 'client.pem'}", "--service-account-issuer=https://test"]
    server += [f"--service-account-signing-key-file={certificates / 'client.key'}"]
    server += ["--disable-admission-plugins=ServiceAccount"]  # no controller makes a namespace's default account
    with contextlib.ExitStack() as running:
        for name, flags in (("etcd", etcd), ("kube-apiserver", server)):
            log = running.enter_context((folder / f"{name}.log").open("w"))
            process = subprocess.Popen([f"{PROGRAMS}/{name}", *flags], stdout=log, stderr=log)
            running.callback(process.wait, 60)
            running.callback(process.terminate)
        made = Cluster(tools, folder / "settings.yaml")
        deadline = time.monotonic() + START_SECONDS
        # Its description of the objects comes later than its readiness, and kubectl asks for it.
        while any(made.run("kubectl", "get", "--raw", path).returncode for path in ("/readyz", "/openapi/v2")):
            runs = process.poll() is None and time.monotonic() < deadline
            assert runs, (folder / "kube-apiserver.log").read_text()
            time.sleep(0.5)
        made.kubectl("apply", "--server-side", f"--filename={CRDS}")
        while made.run("kubectl", "wait", "--for=condition=Established", "crd", "--all").returncode:
            assert time.monotonic() < deadline  # it fails at once while a definition has no state
            time.sleep(0.5)
        space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": RESTRICTED}}
        made.kubectl("create", "--filename=-", given=json.dumps(space))
        yield made


@pytest.mark.parametrize("case", CASES)
def test_it_takes_what_the_chart_gives(cluster: Cluster, rendered: Path, case: str) -> None:
    """Fields that it does not know, values that it refuses and warnings of its own would show."""
    file = f"--filename={rendered / f'{case}.yaml'}"
    for words in (("--dry-run=server",), ()):
        told = cluster.kubectl("apply", "--server-side", "--validate=strict", *words, file)
        assert "Warning" not in told
    stored = json.loads(cluster.kubectl("get", file, "--output=json"))
    items = stored.get("items", [stored])
    assert sorted((each["kind"], each["metadata"]["name"]) for each in items) == sorted(
        (each["kind"], each["metadata"]["name"]) for each in manifests(rendered, case)
    )
    again = cluster.kubectl("apply", "--server-side", "--validate=strict", file)
    assert again.count("serverside-applied") == len(items)
    cluster.kubectl("delete", file)


def test_a_field_that_it_does_not_know_is_refused(cluster: Cluster, rendered: Path) -> None:
    for kind, path in (
        ("Deployment", ("spec", "template", "spec")),
        ("ScaledObject", ("spec",)),
        ("HTTPRoute", ("spec",)),
    ):
        (item, *_) = (each for each in manifests(rendered, "full") if each["kind"] == kind)
        place = item
        for name in path:
            place = place[name]
        place["gatway"] = 1
        done = cluster.create(item, "--validate=strict", "--dry-run=server")
        assert done.returncode == 1
        assert "unknown field" in done.stderr
        assert "gatway" in done.stderr


@pytest.mark.parametrize("case", ["small", "full", "export"])
def test_its_pods_are_let_into_a_restricted_namespace(cluster: Cluster, rendered: Path, case: str) -> None:
    for number, spec in enumerate(pods(rendered, case)):
        spec.pop("priorityClassName", None)  # the user's, and not in this cluster
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}", "namespace": NAMESPACE}}
        done = cluster.create(pod | {"spec": spec}, "--dry-run=server")
        assert done.returncode == 0, done.stderr
        del spec["containers"][0]["securityContext"]
        done = cluster.create(pod | {"spec": spec}, "--dry-run=server")
        assert done.returncode == 1
        assert 'violates PodSecurity "restricted' in done.stderr


def test_helm_installs_upgrades_and_rolls_back(cluster: Cluster) -> None:
    """Nothing that an upgrade changes is immutable, and the canary's weight is what was asked for."""

    def weights() -> dict[str, int]:
        route = json.loads(cluster.kubectl("get", "httproute", "--output=json"))["items"][0]
        return {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]}

    def helm(*words: str) -> str:
        done = cluster.run("helm", *words, "--namespace", NAMESPACE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    values = (str(CHART), "--values", str(CHART / "ci/full.yaml"))
    helm("install", "t", *values)
    first = weights()
    helm("upgrade", "t", *values, "--set", "canary.weight=50,server.graceSeconds=60,image.tag=1.2.4")
    assert (first, weights()) == (
        {"t-gateway": 90, "t-canary-gateway": 10},
        {"t-gateway": 50, "t-canary-gateway": 50},
    )
    helm("rollback", "t", "1")
    assert weights() == first
    helm("uninstall", "t")
    assert json.loads(cluster.kubectl("get", "deployments", "--output=json"))["items"] == []
