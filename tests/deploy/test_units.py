"""The systemd unit, the container files and the manifests, as far as they can be checked without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from supervisor.producer import DEMO_SCRIPT
from supervisor.settings import PREFIX, Settings

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "systemd/mongo-job-supervisor.service"
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
STOP_SECONDS = DEFAULTS["shutdown_timeout"] + DEFAULTS["kill_grace"] + 15
YAML_FILES = sorted(path for path in DEPLOY.rglob("*.y*ml"))

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def unit_values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the interpreter of this test instead of an installed one, which `verify` looks for."""
    path = tmp_path / UNIT.name
    installed = "/opt/mongo-job-supervisor/bin/python"
    assert installed in UNIT.read_text()
    path.write_text(UNIT.read_text().replace(installed, sys.executable))
    return path


@needs_systemd_analyze
def test_systemd_accepts_the_unit(unit: Path) -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=60)
    mine = [line for line in verified.stderr.splitlines() if unit.name in line]
    assert (verified.returncode, mine) == (0, [])


@needs_systemd_analyze
def test_of_the_unit_as_shipped_only_its_interpreter_is_missed() -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(UNIT)]
    verified = subprocess.run(command, capture_output=True, text=True, timeout=60)
    mine = [line for line in verified.stderr.splitlines() if UNIT.name in line]
    assert all("/opt/mongo-job-supervisor/bin/python is not executable" in line for line in mine), mine
    assert "complains of the unit as shipped that its command is not executable" in " ".join(
        (DEPLOY / "systemd/README.md").read_text().split()
    )


@needs_systemd_analyze
def test_the_stated_security_score_is_the_real_one(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    rated = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "Overall exposure" not in rated.stdout:
        pytest.skip("this systemd-analyze cannot rate a unit without a running systemd")
    score = re.search(r"Overall exposure level for \S+: (\S+)", rated.stdout)
    assert score is not None
    assert float(score[1]) <= 2.0
    if "systemd 252" in subprocess.run(["systemctl", "--version"], capture_output=True, text=True).stdout:
        assert f"**{score[1]}**" in (DEPLOY / "systemd/README.md").read_text()


def test_the_unit_waits_as_long_as_a_drain_takes() -> None:
    assert unit_values("TimeoutStopSec") == [f"{STOP_SECONDS:.0f}"]
    assert unit_values("KillMode") == ["mixed"]
    assert unit_values("Type") == ["notify"]


def test_the_unit_is_started_again_for_ever_but_not_with_wrong_settings() -> None:
    """A MongoDB that is away at boot ends every start with exit code 3."""
    assert unit_values("StartLimitIntervalSec") == ["0"]
    assert unit_values("StartLimitBurst") == []
    assert (unit_values("Restart"), unit_values("RestartPreventExitStatus")) == (["on-failure"], ["2"])
    (pause,) = unit_values("RestartSec")
    assert 1 <= int(pause) <= 30
    assert f"restart after {pause} seconds" in (DEPLOY / "systemd/README.md").read_text()


def test_so_are_the_containers() -> None:
    services = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]
    assert {service.get("restart") for service in services.values()} == {"unless-stopped"}
    pod = manifest("daemonset")["spec"]["template"]["spec"]
    assert pod.get("restartPolicy", "Always") == "Always"


def test_the_containers_have_time_to_drain() -> None:
    services = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]
    graces = {name: service.get("stop_grace_period") for name, service in services.items() if "supervisor" in name}
    assert graces == {"supervisor-1": f"{STOP_SECONDS:.0f}s", "supervisor-2": f"{STOP_SECONDS:.0f}s"}
    pod = yaml.safe_load((DEPLOY / "kubernetes/daemonset.yaml").read_text())["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == STOP_SECONDS


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_yaml_file_is_one(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text()))


def deployed_files() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".py", ".sh", ".pyc")]


def test_every_setting_that_is_named_exists() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {f"{PREFIX}ENV_FILE"}
    named = {name for path in deployed_files() for name in re.findall(rf"\b{PREFIX}[A-Z_]+\b", path.read_text())}
    assert named - known == set()
    assert named


def test_every_port_is_the_default_one() -> None:
    port = DEFAULTS["metrics_port"]
    container = manifest("daemonset")["spec"]["template"]["spec"]["containers"][0]
    assert [one["containerPort"] for one in container["ports"]] == [port]
    assert [one["port"] for one in manifest("service")["spec"]["ports"]] == [port]
    for path in (DEPLOY / "prometheus/targets.yml", DEPLOY / "docker/targets.yml"):
        (group,) = yaml.safe_load(path.read_text())
        assert {target.split(":")[1] for target in group["targets"]} == {str(port)}
    assert f"127.0.0.1:{port}/healthz" in (DEPLOY / "docker/Dockerfile").read_text()


def manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / f"kubernetes/{name}.yaml").read_text())
    return content


def test_the_manifests_fit_together() -> None:
    kustomization = manifest("kustomization")
    assert sorted(kustomization["resources"]) == sorted(
        path.name for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml"
    )
    daemonset = manifest("daemonset")
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("service")["spec"]["selector"].items() <= labels.items()
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    assert container["image"] in [image["name"] for image in kustomization["images"]]
    assert [source["configMapRef"]["name"] for source in container["envFrom"]] == [
        manifest("settings")["metadata"]["name"]
    ]
    probes = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe")}
    assert (probes, container["readinessProbe"]["httpGet"]["path"]) == ({"/healthz"}, "/readyz")


@pytest.mark.parametrize("name", ["namespace", "settings", "daemonset", "service"])
def test_the_manifests_match_the_schema_of_kubernetes(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(manifest(name), validator.latest_version(), strict=True)


def test_what_compose_mounts_is_there() -> None:
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "docker" / source).exists(), (name, source)
            else:
                assert source in compose["volumes"], (name, source)
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing here has a password"


def test_the_demo_finds_its_script_in_the_containers() -> None:
    """`supervisor.producer demo` looks in the tasks/ of the working directory."""
    workdir = re.findall(r"^WORKDIR (\S+)$", (DEPLOY / "docker/Dockerfile").read_text(), re.MULTILINE)[-1]
    for name, service in yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"].items():
        if "supervisor" in name:
            mounted = {target: source for source, target in (each.split(":")[:2] for each in service["volumes"])}
            assert (DEPLOY / "docker" / mounted[f"{workdir}/tasks"] / DEMO_SCRIPT).is_file(), name


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "docker/Dockerfile").read_text(), re.MULTILINE)
    ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
    sources = [source for line in copied for source in line.split()]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert f"!{source}" in ignored
