"""Several supervisors on several hosts share one MongoDB: work spreads, is pinned by queues, and survives a cut."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from supervisor import JobManager
from tests.hosts.namespaces import HostSupervisor, Network, why_not
from tests.support.mongod import TcpServer
from tests.support.running import GatedJob, Jobs, end
from tests.support.waiting import wait_until

NAMES = ("alpha", "beta", "gamma")
LEASE_SECONDS = 6.0
_why_not = why_not()
pytestmark = pytest.mark.skipif(_why_not is not None, reason=_why_not or "")


@dataclass(frozen=True)
class Cluster:
    """Three hosts with a supervisor each; each serves a queue of its own besides `default`."""

    supervisors: dict[str, HostSupervisor]
    jobs: Jobs

    def where(self, job: GatedJob) -> str:
        """The name of the host that runs it."""
        name: str = job.get()["lock"]["host"]
        return name


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("hosts")
    db_name = f"test_{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        server = stack.enter_context(TcpServer(network.address))
        manager = stack.enter_context(JobManager(server.uri, db_name))
        supervisors = {}
        for name in NAMES:
            supervisor = HostSupervisor(
                network.add_host(name), directory, server.uri, db_name,
                queues=f"default,{name}", lease_seconds=LEASE_SECONDS, poll_interval=1, data_dir=f"data-{name}",
            )  # fmt: skip
            stack.callback(end, supervisor)
            supervisors[name] = supervisor
            supervisor.start(ready=False)
        for supervisor in supervisors.values():
            supervisor.wait_idle(2, timeout=60)
        yield Cluster(supervisors, Jobs(directory, manager))


def test_jobs_spread_over_all_hosts(cluster: Cluster) -> None:
    jobs = [cluster.jobs.gated() for _ in range(6)]
    for job in jobs:
        job.wait_started()
    assert Counter(map(cluster.where, jobs)) == dict.fromkeys(NAMES, 2)
    for job in jobs:
        assert job.finish("completed")["attempts"] == 1


def test_queues_pin_jobs_to_hosts(cluster: Cluster) -> None:
    jobs = {(name, number): cluster.jobs.gated(queue=name) for name in NAMES for number in range(3)}
    for name in NAMES:  # two of each run, the third waits although other hosts come free
        wait_until(lambda name=name: _started(jobs, name) == 2, what=f"two jobs on {name}")
        assert cluster.jobs.collection.count_documents({"queue": name, "status": "pending"}) == 1
    for (name, _), job in jobs.items():
        job.let_go()
        done = cluster.jobs.wait(job.id, "completed")
        assert any(f"on {name}" in line for line in done["logs"]), done["logs"]


def _started(jobs: dict[tuple[str, int], GatedJob], name: str) -> int:
    return sum(bool(job.notes("main", 1)) for (queue, _), job in jobs.items() if queue == name)


def test_status_shows_every_host(cluster: Cluster) -> None:
    job = cluster.jobs.gated(queue="beta")
    job.wait_started()
    shown = cluster.supervisors["alpha"].json("status")
    assert [each["host"] for each in shown["supervisors"]] == list(NAMES)
    assert all(each["live"] for each in shown["supervisors"])
    assert {tuple(each["queues"]) for each in shown["supervisors"]} == {("default", name) for name in NAMES}
    assert [running["lock"]["host"] for running in shown["running"]] == ["beta"]
    text = cluster.supervisors["gamma"].command("status").stdout
    assert all(name in text for name in NAMES), text
    job.finish("completed")


def test_a_host_that_is_cut_off_gives_up_its_jobs_in_time(cluster: Cluster) -> None:
    """Its jobs stop before their lease ends, run elsewhere, and complete once; it carries on by itself."""
    jobs = [cluster.jobs.gated() for _ in range(6)]
    for job in jobs:
        job.wait_started()
    lost = [job for job in jobs if cluster.where(job) == "alpha"]
    kept = [job for job in jobs if job not in lost]
    assert len(lost) == 2
    alpha = cluster.supervisors["alpha"]
    pid = alpha.pid
    with alpha.host.isolated():
        expiries = [_boottime(job.get()["lock"]["expires_at"].timestamp()) for job in lost]
        for job in kept[:2]:  # makes room elsewhere
            job.let_go()
        for job in lost:
            job.wait_started(attempt=2, timeout=60)
        assert {cluster.where(job) for job in lost} <= {"beta", "gamma"}
        owners = [job.get()["lock"] for job in lost]
        for job, expires_at in zip(lost, expiries, strict=True):
            ended = max(at for _, at in job.notes("beat", 1))
            began = min(at for _, at in job.notes("main", 2))
            assert ended < began, "two attempts ran at the same time"
            assert ended < expires_at, "it went on after its lease"
    wait_until(lambda: alpha.get("/readyz")[0] == 200, timeout=120, what=lambda: f"alpha to be back: {alpha.log()}")
    # It has reported what it knew of its jobs: nothing of that may be written over their new owners' state.
    wait_until(lambda: alpha.log().count(" job_disowned ") == 2, timeout=60, what=lambda: alpha.log())
    for job, owner in zip(lost, owners, strict=True):
        document = job.get()
        assert document["status"] == "running"
        assert document["lock"]["token"] == owner["token"]
        assert (document["attempts"], document["losses"]) == (2, 1)
    for job in (*lost, *kept):
        done = job.finish("completed")
        assert done["attempts"] == (2 if job in lost else 1)
        assert done.get("losses", 0) == (1 if job in lost else 0)
        assert not job.notes("main", 3)
    assert alpha.pid == pid and alpha.process is not None and alpha.process.poll() is None
    back = cluster.jobs.gated(queue="alpha")
    back.wait_started(timeout=60)
    assert cluster.where(back) == "alpha"
    back.finish("completed")


def test_a_short_cut_costs_nothing(cluster: Cluster) -> None:
    job = cluster.jobs.gated(queue="beta")
    job.wait_started()
    with cluster.supervisors["beta"].host.isolated():
        time.sleep(LEASE_SECONDS / 6)
    before = job.get()["lock"]["expires_at"]
    wait_until(lambda: job.get()["lock"]["expires_at"] > before, what="the lease to be renewed")
    done = job.finish("completed")
    assert (done["attempts"], done.get("losses", 0)) == (1, 0)


def test_a_host_whose_network_is_gone_can_be_stopped(cluster: Cluster) -> None:
    """It ends by itself, although it can say goodbye to nobody; what it ran moves."""
    job = cluster.jobs.gated()
    job.wait_started()
    gone = cluster.supervisors[cluster.where(job)]
    with gone.host.isolated():
        assert gone.stop(timeout=60) == 0
        job.wait_started(attempt=2, timeout=60)
        assert max(at for _, at in job.notes("beat", 1)) < min(at for _, at in job.notes("main", 2))
    job.finish("completed")
    gone.start()
    gone.wait_idle(2)


def _boottime(timestamp: float) -> float:
    """A time of day on the clock that jobs write down. The server and the hosts are one machine here."""
    return timestamp - time.time() + time.clock_gettime(time.CLOCK_BOOTTIME)
