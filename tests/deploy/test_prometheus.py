"""The scrape configuration, the alerts and the dashboard, with a real promtool and a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from supervisor import JobManager
from supervisor.metrics import Metrics
from tests.support.running import Jobs, RunningSupervisor, free_port, running_supervisor
from tests.support.waiting import wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
ALERT_EXPRESSIONS = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    """Every query of the dashboard, its variables filled in as Grafana does it."""
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [
        expression.replace("$__rate_interval", "20s").replace("$instance", ".*").replace("$queue", ".*")
        for expression in expressions
    ]


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:supervisor|process)_\w+(?=[{\[)\s]|$)", re.sub(r'"[^"]*"', "", expression)))


def exposed_samples() -> dict[str, set[str]]:
    """The samples that a supervisor exposes, with the labels of each."""
    metrics = Metrics()
    metrics.set_queue_state({}, {})
    metrics.observe_operation("claim", 0.1, True)
    exposed: dict[str, set[str]] = {}
    for line in generate_latest(metrics.registry).decode().splitlines():
        if sample := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            exposed.setdefault(sample[1], set()).update(re.findall(r'(\w+)="', sample[2] or ""))
    return exposed


# -- what needs no server


@needs_promtool
def test_the_configuration_is_valid(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    checked = subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert b"8 rules found" in checked.stdout


def test_the_configuration_for_a_cluster_fits_the_manifests_and_the_alerts() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/kubernetes.yml").read_text())["scrape_configs"]
    (other,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == other["job_name"]
    assert all(f'job="{job["job_name"]}"' in expression for expression in ALERT_EXPRESSIONS)
    daemonset = yaml.safe_load((DEPLOY / "kubernetes/daemonset.yaml").read_text())
    namespace = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["namespace"]
    (found,) = job["kubernetes_sd_configs"]
    assert found["namespaces"]["names"] == [namespace]
    name, _, value = found["selectors"][0]["label"].partition("=")
    assert daemonset["spec"]["template"]["metadata"]["labels"][name] == value
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    assert job["relabel_configs"][0]["regex"] == container["ports"][0]["name"]


def test_the_operator_names_the_job_as_the_alerts_need_it() -> None:
    """Without a jobLabel the job is named after the Service that the ServiceMonitor selects."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    monitor = yaml.safe_load(text)["spec"]
    service = yaml.safe_load((DEPLOY / "kubernetes/service.yaml").read_text())
    assert "jobLabel" not in monitor
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert f'job="{service["metadata"]["name"]}"' in ALERT_EXPRESSIONS[0]


@needs_promtool
def test_the_configuration_for_a_cluster_is_valid(tmp_path: Path) -> None:
    """All but its discovery, which the Prometheus of some distributions is built without."""
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    configuration = yaml.safe_load((tmp_path / "kubernetes.yml").read_text())
    del configuration["scrape_configs"][0]["kubernetes_sd_configs"]
    (tmp_path / "without.yml").write_text(yaml.safe_dump(configuration))
    checked = subprocess.run(["promtool", "check", "config", "without.yml"], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@needs_promtool
def test_the_alerts_pass_their_own_tests() -> None:
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    tested = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_is_tested_both_ways() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("expression", sorted({*dashboard_expressions(), *ALERT_EXPRESSIONS}))
def test_every_query_asks_for_metrics_and_labels_that_exist(expression: str) -> None:
    exposed = exposed_samples()
    names = metric_names(expression)
    assert names or "up{" in expression
    assert names <= set(exposed)
    known = {"job", "instance"}.union(*(exposed[name] for name in names))
    selectors = "".join(re.findall(r"\{(.*?)\}", expression))
    used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selectors))
    for grouping in re.findall(r"\bby \((.*?)\)", expression):
        used |= {label.strip() for label in grouping.split(",")}
    assert used <= known


def test_what_every_supervisor_reports_alike_is_never_summed() -> None:
    shared = ("supervisor_jobs{", "supervisor_queue_jobs", "supervisor_queue_oldest")
    for expression in (*dashboard_expressions(), *ALERT_EXPRESSIONS):
        if any(name in expression for name in shared):
            assert "max" in expression, expression


def test_the_dashboard_is_well_formed() -> None:
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(identifiers) == len(set(identifiers))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__all"} <= declared


# -- with a real Prometheus


class Prometheus:
    """A Prometheus on a free port, with the configuration in deploy/ but faster."""

    def __init__(self, directory: Path, targets: list[str]) -> None:
        self.directory = directory
        self.port = free_port()
        shutil.copytree(DEPLOY / "prometheus", directory)
        config = yaml.safe_load((directory / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["scrape_timeout"] = "1s"
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        (directory / "targets.yml").write_text(yaml.safe_dump([{"targets": targets}]))

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.directory / "log", "wb") as log:
            return subprocess.Popen(
                [
                    "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get("targets")["activeTargets"])
        return False


@contextlib.contextmanager
def running_prometheus(directory: Path, targets: list[str]) -> Iterator[Prometheus]:
    prometheus = Prometheus(directory, targets)
    process = prometheus.start()
    try:
        wait_until(prometheus.answers, timeout=60, what=lambda: (directory / "log").read_text()[-2000:])
        yield prometheus
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def supervisor(tmp_path: Path, mongo_uri: str, db_name: str) -> Iterator[RunningSupervisor]:
    with running_supervisor(tmp_path, mongo_uri, db_name, log_level="warning") as running:
        yield running


HOG = "block = b'x' * (200 << 20)\nimport time\ntime.sleep(30)\n"


def load(jobs: Jobs) -> list[str]:
    """One job of each kind that has a series of its own."""
    quick = jobs.script("print('done')\n", "quick.py")
    hog = jobs.script(HOG, "hog.py")
    failing = jobs.script("raise SystemExit(3)\n", "failing.py")
    return [
        *(jobs.submit(quick, queue=queue) for queue in ("default", "mail", "mail")),
        jobs.submit(hog, required_memory=64),
        jobs.submit(failing, max_attempts=2, retry_delay=0.1),
    ]


@needs_prometheus
def test_every_query_of_the_dashboard_sees_a_supervisor_under_load(
    tmp_path: Path, supervisor: RunningSupervisor, mongo_uri: str, db_name: str
) -> None:
    with (
        JobManager(mongo_uri, db_name=db_name) as manager,
        running_prometheus(tmp_path / "prometheus", [f"127.0.0.1:{supervisor.port}"]) as prometheus,
    ):
        jobs = Jobs(tmp_path, manager)
        wait_until(lambda: prometheus.query("supervisor_workers"), what="the first scrape")
        for job in load(jobs):
            jobs.wait(job)
        without_answer = dashboard_expressions()
        deadline = time.monotonic() + 60
        while without_answer and time.monotonic() < deadline:
            without_answer = [expression for expression in without_answer if not sees(prometheus, expression)]
        assert without_answer == []
        expected = {
            'supervisor_jobs_finished_total{status="completed"}': 3,
            'supervisor_jobs_finished_total{reason="memory_exceeded"}': 1,
            'supervisor_jobs_finished_total{reason="exit_code"}': 1,
            'supervisor_jobs_retried_total{reason="exit_code"}': 1,
            "supervisor_memory_kills_total": 1,
            'supervisor_jobs_claimed_total{queue="mail"}': 2,
        }
        for expression, value in expected.items():  # with the scrape after the last job, at the latest
            wait_until(lambda: exactly(prometheus, expression, value), what=expression)  # noqa: B023
        types = {name: entries[0]["type"] for name, entries in prometheus.get("metadata").items()}
        assert types["supervisor_job_wait_seconds"] == "histogram"  # read as OpenMetrics, which it prefers
        assert types["supervisor_memory_kills"] == "counter"


@needs_promtool
def test_promtool_finds_nothing_to_say_about_a_real_supervisor(
    tmp_path: Path, supervisor: RunningSupervisor, mongo_uri: str, db_name: str
) -> None:
    with JobManager(mongo_uri, db_name=db_name) as manager:
        jobs = Jobs(tmp_path, manager)
        jobs.wait(jobs.submit(jobs.script("print('done')\n")))
    wait_until(lambda: supervisor.metric("jobs_finished_total", status="completed") == 1, what="the metric")
    exposed = supervisor.get("/metrics")[1].encode()
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def sees(prometheus: Prometheus, expression: str) -> bool:
    """Whether a query has an answer that is a number: a quantile of no events is NaN."""
    return any(sample["value"][1] != "NaN" for sample in prometheus.query(expression))


def exactly(prometheus: Prometheus, expression: str, value: float) -> bool:
    return [float(sample["value"][1]) for sample in prometheus.query(f"sum({expression})")] == [value]


@needs_prometheus
def test_the_alerts_are_evaluated_and_the_right_one_is_raised(tmp_path: Path) -> None:
    with running_prometheus(tmp_path / "prometheus", [f"127.0.0.1:{free_port()}"]) as prometheus:

        def states() -> dict[str, tuple[str, str]]:
            rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
            return {rule["name"]: (rule["health"], rule["state"]) for rule in rules}

        wait_until(lambda: states().get("SupervisorDown") == ("ok", "pending"), timeout=60, what=lambda: str(states()))
        wait_until(lambda: states()["NoSupervisor"] == ("ok", "pending"), timeout=60, what=lambda: str(states()))
        assert {health for health, _ in states().values()} == {"ok"}
        assert {name for name, (_, state) in states().items() if state != "inactive"} == {
            "SupervisorDown",
            "NoSupervisor",
        }
