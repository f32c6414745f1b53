"""The Helm chart, rendered by the real helm and judged by other people's validators: `make charts`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.charts.rendering import CASES, manifests, of, pods, render

pytestmark = pytest.mark.charts

KUBERNETES = ("1.31", "1.33", "1.37")
# What checkov asks for and the chart leaves to its user, with the reason.
LEFT = {
    "CKV_K8S_21": "the namespace is the release's",
    "CKV_K8S_11": "a limit of processor time stalls threads that compute together",
    "CKV_K8S_43": "the image is the user's: a digest can be its tag",
    "CKV_K8S_15": "image.pullPolicy",
    "CKV_K8S_40": "the images' user is 1000",
    "CKV_K8S_35": "the launcher takes a key of its user's from the environment alone",
}


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_it(tools: Path, rendered: Path, tmp_path: Path, case: str) -> None:
    """Against the schemas of several releases, which know no custom resources."""
    builtin = [
        each
        for each in manifests(rendered, case)
        if "." not in each["apiVersion"]
        or ("networking.k8s.io/v1" in each["apiVersion"] and not each["apiVersion"].startswith("gateway."))
    ]
    assert builtin or case == "kserve"
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(builtin))
    for version in KUBERNETES:
        command = [str(tools / "kubernetes-validate"), "--strict", "--kubernetes-version", version]
        done = subprocess.run([*command, str(tmp_path / "all.yaml")], capture_output=True, text=True, check=False)
        if builtin:
            assert done.returncode == 0, done.stdout + done.stderr


def test_checkov_finds_nothing_but_what_is_left_to_the_user(tools: Path, rendered: Path) -> None:
    command = [str(tools / "checkov"), "--directory", str(rendered), "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["passed"] > 300
    failed = {check["check_id"] for check in found["results"]["failed_checks"]}
    assert failed == LEFT.keys(), found["results"]["failed_checks"]


def test_every_pod_is_as_hard_to_misuse_as_the_image(rendered: Path) -> None:
    for case in ("small", "full", "export"):
        for pod in pods(rendered, case):
            assert (pod["automountServiceAccountToken"], pod["securityContext"]["runAsNonRoot"]) == (False, True)
            for container in (*pod["containers"], *pod.get("initContainers", ())):
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"]
                assert not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
                assert {*writable} <= {"/tmp", "/dev/shm"} | (
                    {"/models", "/cache"} if container["name"] == "export" else set()
                )


def test_servers_end_after_their_answers(rendered: Path) -> None:
    (pod,) = pods(rendered, "small")
    (container,) = pod["containers"]
    assert container["args"] == ["--grace=45"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert pod["terminationGracePeriodSeconds"] == 5 + 45 + 15
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/metrics"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900
    memory = next(each for each in pod["volumes"] if each["name"] == "shared-memory")
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_the_gateway_asks_every_server_of_its_track(rendered: Path) -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in of(rendered, "full", "Service")}
    deployments = {each["metadata"]["name"]: each["spec"]["template"] for each in of(rendered, "full", "Deployment")}
    for gateway, service, servers in (
        ("t-gateway", "t-stable-servers", {"t-cpu", "t-gpu"}),
        ("t-gateway-canary", "t-canary-servers", {"t-canary"}),
    ):
        (container,) = deployments[gateway]["spec"]["containers"]
        assert f"--triton=dns:{service}:8001" in container["args"]
        assert "--keys=/etc/trident/keys.json" in container["args"]
        assert services[service]["clusterIP"] == "None"
        selected = services[service]["selector"].items()
        chosen = {name for name, each in deployments.items() if selected <= each["metadata"]["labels"].items()}
        assert chosen == servers
    images = {name: each["spec"]["containers"][0]["image"] for name, each in deployments.items()}
    assert images["t-cpu"].endswith(":1.2.3")
    assert images["t-gpu"].endswith(":1.2.3-gpu")
    assert images["t-canary"].endswith(":1.3.0")
    (canary,) = (each["image"]["reference"] for each in deployments["t-canary"]["spec"]["volumes"] if "image" in each)
    assert canary.endswith(":2026-12")
    (route,) = of(rendered, "full", "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert {each["name"]: each["weight"] for each in rule["backendRefs"]} == {"t-gateway": 90, "t-canary-gateway": 10}
    assert all(each["name"] in services for each in rule["backendRefs"])
    (route,) = of(rendered, "full", "GRPCRoute")
    methods = {match["method"]["method"] for match in route["spec"]["rules"][0]["matches"]}
    assert {"ModelInfer", "ModelStreamInfer"} <= methods
    assert not [
        each for each in methods if each.startswith(("Repository", "SystemShared", "CudaShared", "Trace", "Log"))
    ]


def test_who_may_ask_whom(rendered: Path) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of(rendered, "full", "NetworkPolicy")}
    requests, metrics = policies["t-servers"]["ingress"]
    assert [port["port"] for port in requests["ports"]] == ["http", "grpc"]
    assert requests["from"][0]["podSelector"]["matchLabels"]["trident/role"] == "gateway"
    assert requests["from"][1]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "gateways"}
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]
    assert policies["t-servers"]["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    ]
    (policy, _) = of(rendered, "export", "NetworkPolicy")
    assert policy["spec"]["egress"] == [{}]  # its init container reads from a hub


def test_scaling(rendered: Path) -> None:
    (scaled,) = of(rendered, "full", "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"] == {"name": "t-cpu"}
    assert [trigger["metadata"]["threshold"] for trigger in scaled["spec"]["triggers"]] == ["4", "24", "2"]
    (horizontal,) = of(rendered, "full", "HorizontalPodAutoscaler")
    assert horizontal["spec"]["scaleTargetRef"]["name"] == "t-gpu"
    replicas = {each["metadata"]["name"]: each["spec"].get("replicas") for each in of(rendered, "full", "Deployment")}
    assert (replicas["t-cpu"], replicas["t-gpu"]) == (None, None)  # the scaler's, which an upgrade must not reset
    budgets = {each["metadata"]["name"] for each in of(rendered, "full", "PodDisruptionBudget")}
    assert budgets == {"t-cpu", "t-gpu", "t-gateway"}


def test_kserve_gets_the_same_pod(rendered: Path) -> None:
    (runtime,) = of(rendered, "kserve", "ServingRuntime")
    (service,) = of(rendered, "kserve", "InferenceService")
    predictor = service["spec"]["predictor"]
    (container,) = runtime["spec"]["containers"]
    assert (container["name"], container["ports"]) == (
        "kserve-container",
        [{"name": "http1", "containerPort": 8000, "protocol": "TCP"}],
    )
    assert predictor["model"] == {"modelFormat": {"name": "trident"}, "runtime": "t-cpu", "protocolVersion": "v2"}
    assert (predictor["minReplicas"], predictor["automountServiceAccountToken"]) == (0, False)
    assert predictor["terminationGracePeriodSeconds"] == 65
    assert container["securityContext"]["readOnlyRootFilesystem"]
    models = next(each for each in container["volumeMounts"] if each["name"] == "models")
    assert models == {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "repository"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("mode=x", "value must be one of 'deployment', 'kserve'"),
        ("models.source=oci", "at '/models/oci/reference': minLength"),
        ("models.source=export", "at '/models/export/image': minLength"),
        ("routes.enabled=true", "at '/routes/parentRefs': minItems"),
        ("gatway.enabled=true", "additional properties 'gatway' not allowed"),
        ("server.graceSeconds=0", "at '/server/graceSeconds': minimum"),
        ("pools[0].name=gateway", "at '/pools/0/name'"),
    ],
)
def test_values_that_can_not_be(tools: Path, settings: str, message: str) -> None:
    done = render(tools, "--set", settings)
    assert done.returncode == 1
    assert message in done.stderr
