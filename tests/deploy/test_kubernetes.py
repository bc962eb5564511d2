"""The Kubernetes manifests: valid to the letter, restricted, and their parts fit together."""

from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from steer_service.server.app import SERVICES
from steer_service.server.config import ServerConfig
from steer_service.server.engine_series import WAITING
from steer_service.server.health import Health
from steer_service.server.http_listener import HttpListener
from steer_service.server.pulse import Pulse
from tests.deploy.rendered import (
    KUBERNETES,
    OVERLAYS,
    bytes_of,
    containers,
    environment,
    mounts,
    objects,
    of_kind,
    one,
    pod,
    server,
    volumes,
)

kubernetes_validate = pytest.importorskip("kubernetes_validate")

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
"""Versions of Kubernetes; autoscaling/v2 and all fields used here are in both."""

CUSTOM = {"PodMonitor": "monitoring.coreos.com/v1"}
"""Kinds that other projects define, and whose schema is not here."""

CLOSE_S = 45.0
"""Seconds that a server may need after its grace to close connections and its engine, see docs/operations.md."""

PROCESSES = {"cpu": 4 * 2**30, "mesh": 4 * 2**30, "sidecar-client": 4 * 2**30, "gpu": 24 * 2**30}
"""Bytes of the server's processes without shared memory. On a CPU: weights and 1 GiB of KV cache included."""

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@each_overlay
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_has_no_other_field_than_those_of_its_schema(overlay: str, version: str) -> None:
    checked = [each for each in objects(overlay) if each["kind"] not in CUSTOM]

    for each in checked:
        kubernetes_validate.validate(each, version, strict=True)
    assert len(checked) >= 7
    assert all(each["apiVersion"] == CUSTOM[each["kind"]] for each in objects(overlay) if each not in checked)


@pytest.mark.parametrize("overlay", ["gpu", "mesh"])
def test_the_monitor_has_no_other_field_than_those_of_its_definition(overlay: str) -> None:
    definitions = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
    monitor = one(overlay, "PodMonitor")
    labels = one(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["spec"]["jobLabel"]] == "steerllm"  # the job that the alerts and the dashboard name
    read = definitions.PodMonitor.model_validate(monitor)
    assert read.model_dump(by_alias=True, exclude_none=True, exclude_unset=True) == monitor


def test_the_validation_sees_a_field_that_does_not_exist() -> None:
    service = {**of_kind("cpu", "Service")[0], "spcc": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, NEWEST, strict=True)


@each_overlay
def test_objects_are_in_one_namespace_and_none_has_the_name_of_another(overlay: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects(overlay)]
    assert len(set(names)) == len(names)

    namespace = one(overlay, "Namespace")["metadata"]["name"]
    for each in objects(overlay):
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == namespace


@each_overlay
def test_pods_satisfy_the_restricted_standard(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context.get("runAsUser", spec["securityContext"]["runAsUser"]) > 0
    labels = one(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert one(overlay, "ServiceAccount")["automountServiceAccountToken"] is False


@each_overlay
def test_selectors_find_the_pods(overlay: str) -> None:
    labels = one(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    selectors = [one(overlay, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in of_kind(overlay, "Service")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(overlay, "PodDisruptionBudget")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(overlay, "PodMonitor")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(overlay, "NetworkPolicy")]
    selectors += [each["labelSelector"]["matchLabels"] for each in pod(overlay)["spec"]["topologySpreadConstraints"]]
    assert len(selectors) >= 6
    for selector in selectors:
        assert selector
        assert selector.items() <= labels
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        target, deployment = scaler["spec"]["scaleTargetRef"], one(overlay, "Deployment")
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
        assert "replicas" not in deployment["spec"], "each update would undo what the autoscaler did"


@each_overlay
def test_ports_are_those_on_which_the_server_listens(overlay: str) -> None:
    ports = {each["name"]: each["containerPort"] for each in server(overlay)["ports"]}
    variables = environment(overlay)
    assert ports == {
        "grpc": int(variables["STEERLLM_ADDRESS"].rpartition(":")[2]),
        "metrics": int(variables["STEERLLM_METRICS_PORT"]),
    }
    assert variables["STEERLLM_INSTANCE"].endswith(f":{ports['grpc']}")

    used = [port["targetPort"] for each in of_kind(overlay, "Service") for port in each["spec"]["ports"]]
    used += [end["port"] for each in of_kind(overlay, "PodMonitor") for end in each["spec"]["podMetricsEndpoints"]]
    (policy,) = of_kind(overlay, "NetworkPolicy")
    used += [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    of_the_mesh = {15008} if overlay == "mesh" else set()
    assert set(used) == {"grpc", "metrics"} | of_the_mesh
    assert policy["spec"].get("egress") == (None if overlay == "mesh" else [])
    for service in of_kind(overlay, "Service"):
        assert all(port["port"] == ports[port["targetPort"]] for port in service["spec"]["ports"])


@each_overlay
def test_services_say_whether_the_port_has_tls(overlay: str) -> None:
    expected = "https" if "STEERLLM_TLS_CERT" in environment(overlay) else "kubernetes.io/h2c"
    protocols = {port["appProtocol"] for each in of_kind(overlay, "Service") for port in each["spec"]["ports"]}
    assert protocols == {expected}
    assert sorted(each["spec"].get("clusterIP", "") for each in of_kind(overlay, "Service")) == ["", "None"]


@each_overlay
async def test_probes_and_metrics_have_paths_that_the_port_answers(overlay: str) -> None:
    listener = HttpListener(CollectorRegistry(), Health(SERVICES), Pulse())
    container = server(overlay)
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: (probe["path"], probe["port"]) for name, probe in probes.items()} == {
        # While the model loads, the process is alive and not ready: only then is a restart right after a bound.
        "startupProbe": ("/ready", "metrics"),
        "livenessProbe": ("/health", "metrics"),
        "readinessProbe": ("/ready", "metrics"),
    }
    paths = [probe["path"] for probe in probes.values()]
    paths += [end["path"] for each in of_kind(overlay, "PodMonitor") for end in each["spec"]["podMetricsEndpoints"]]
    assert all(listener.answer(path, "")[0] != 404 for path in paths)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900


@each_overlay
def test_a_pod_has_time_to_drain(overlay: str) -> None:
    config = ServerConfig.from_environment(environment(overlay))
    assert config.lame_duck_s > server(overlay)["readinessProbe"]["periodSeconds"]
    assert pod(overlay)["spec"]["terminationGracePeriodSeconds"] >= config.lame_duck_s + config.grace_s + CLOSE_S


@each_overlay
def test_memory_limits_have_room_for_volumes_in_memory(overlay: str) -> None:
    container, config = server(overlay), ServerConfig.from_environment(environment(overlay))
    in_memory = {
        name: bytes_of(each["emptyDir"]["sizeLimit"])
        for name, each in volumes(overlay).items()
        if each.get("emptyDir", {}).get("medium") == "Memory"
    }
    assert set(in_memory) == {"captures", "shm"}
    own = PROCESSES[overlay] + config.vector_store_bytes + 2 * config.max_queued_bytes
    assert sum(in_memory.values()) + own <= bytes_of(container["resources"]["limits"]["memory"])
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]

    captures = float(environment(overlay)["STEERLLM_MAX_SHM_GB"]) * 2**30
    assert captures + min(64 * 2**20, in_memory["captures"] / 8) <= in_memory["captures"]
    on_disk = [each["emptyDir"] for name, each in volumes(overlay).items() if "emptyDir" in each]
    disk = sum(bytes_of(each["sizeLimit"]) for each in on_disk if "medium" not in each)
    assert disk <= bytes_of(container["resources"]["limits"]["ephemeral-storage"])


@each_overlay
def test_captures_are_where_the_server_and_its_neighbours_see_them(overlay: str) -> None:
    spec, variables = pod(overlay)["spec"], environment(overlay)
    assert variables["STEERLLM_SHM_GROUP"] == str(spec["securityContext"]["fsGroup"])
    assert variables["STEERLLM_SHM_MODE"] == "640"
    for container in containers(overlay).values():
        assert mounts(container)["captures"]["mountPath"] == variables["STEERLLM_SHM_DIR"]
    assert mounts(server(overlay))["shm"]["mountPath"] == "/dev/shm"


@each_overlay
def test_secrets_are_mounted_as_folders_so_that_new_ones_are_seen(overlay: str) -> None:
    variables, found = environment(overlay), mounts(server(overlay))
    assert not any("subPath" in mount for mount in found.values())
    files = [variables[name] for name in variables if name.startswith(("STEERLLM_TLS", "STEERLLM_TOKEN"))]
    assert len(files) == (0 if overlay == "mesh" else 3)
    for file in files:
        assert file.rpartition("/")[0] in [mount["mountPath"] for mount in found.values() if mount.get("readOnly")]
    assert ("STEERLLM_INSECURE" in variables) == (not files)


def test_the_autoscaler_reads_the_series_that_the_adapter_renames() -> None:
    (rule,) = yaml.safe_load((KUBERNETES / "components/autoscaling/adapter-rules.yaml").read_text())["rules"]["custom"]
    assert f'__name__="{WAITING}"' in rule["seriesQuery"]
    assert rule["name"]["matches"] == f"^{WAITING}$"
    assert f"`{WAITING}`" in (KUBERNETES.parents[1] / "docs/configuration.md").read_text()

    metrics: list[Any] = one("gpu", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [each["pods"]["metric"]["name"] for each in metrics] == [rule["name"]["as"]]
