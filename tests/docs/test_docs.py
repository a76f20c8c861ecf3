"""What the documentation says of the code is what the code says of itself, in both directions."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from supervisor import producer
from supervisor.attempt import Attempt
from supervisor.cli import main as commands
from supervisor.cli.batch import WRITTEN
from supervisor.cli.run import START_SECONDS
from supervisor.errors import StoreUnavailable, SupervisorError
from supervisor.job import JobSpec, Outcome, Verdict
from supervisor.metrics import INSTRUMENTS
from supervisor.settings import PREFIX, Settings
from supervisor.states import Reason, Status
from supervisor.store import transitions
from supervisor.store.roles import role_commands
from supervisor.supervisor import SIGNALS
from supervisor.web import server
from supervisor.worker import Worker
from tests.docs.tables import EXAMPLE, REFERENCE, REPOSITORY, every_command, settings_example, with_tables

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "deploy").rglob("*.md"))]
README = PAGES[0].read_text("utf-8")
REFERENCE_TEXT = REFERENCE.read_text("utf-8")
ALL_TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
UPDATE = "run: python -m tests.docs.tables"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"there is no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {index for index, row in enumerate(cells[1:]) if set(row[0]) == {"-"}}
    return [row for index, row in enumerate(cells) if index not in heads and set(row[0]) != {"-"}]


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# -- generated parts


def test_the_example_of_the_settings_is_what_the_settings_are() -> None:
    assert EXAMPLE.read_text("utf-8") == settings_example(), UPDATE


def test_the_example_of_the_settings_is_accepted_and_holds_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
    active = re.sub(rf"^#({PREFIX})", r"\1", EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)
    (tmp_path / "settings.env").write_text(active)
    assert len(re.findall(rf"^{PREFIX}", active, re.MULTILINE)) == len(Settings.model_fields)
    assert Settings(_env_file=tmp_path / "settings.env") == Settings(_env_file=None)  # type: ignore[call-arg]


def test_the_tables_of_the_reference_are_what_the_code_says() -> None:
    assert with_tables(REFERENCE_TEXT) == REFERENCE_TEXT, UPDATE


def test_the_tables_hold_everything() -> None:
    """Guards the generator: each name of the code stands in its table, and no other."""
    settings = [names(row[0])[0] for row in rows(section(REFERENCE_TEXT, "Settings"))]
    assert settings == [name.upper() for name in Settings.model_fields]
    metrics = [names(row[0])[0] for row in rows(section(REFERENCE_TEXT, "Metrics"))]
    assert metrics == [instrument.name for instrument in INSTRUMENTS]
    signals = [names(row[0])[0] for row in rows(section(REFERENCE_TEXT, "Signals"))]
    assert signals == [number.name for number in SIGNALS]
    documented = section(REFERENCE_TEXT, "Commands")
    for prog, parser in every_command():
        part = documented[documented.index(f"**`{prog}") :].split("**`", 2)[1]
        options = {name for row in rows(part) for name in re.findall(r"--?[a-z][a-z-]*", names(row[0])[0])}
        assert options == set(parser._option_string_actions) - {"-h", "--help"}, prog


def test_no_generated_description_is_empty() -> None:
    for title, column in (("Settings", 2), ("Signals", 1), ("Metrics", 3)):
        table = rows(section(REFERENCE_TEXT, title))
        assert [row[0] for row in table if not row[column]] == [], title
    documented = section(REFERENCE_TEXT, "Commands")
    assert [row[0] for row in rows(documented) if not row[1]] == []
    assert re.findall(r"^\*\*`.*`\*\*:? *$", documented, re.MULTILINE) == []


def test_the_exit_code_of_a_supervisor_without_mongodb_is_documented() -> None:
    text = section(REFERENCE_TEXT, "Exit codes")
    supervisors = {row[0]: row[2] for row in rows(text)}
    assert "MongoDB cannot be reached" in supervisors[str(StoreUnavailable.exit_code)]
    assert f"ends with code {StoreUnavailable.exit_code} after {START_SECONDS:.0f} seconds" in text
    assert "starts all the same" not in ALL_TEXT


# -- names that stand in prose


def test_every_setting_that_is_named_exists() -> None:
    known = {name.upper() for name in Settings.model_fields} | {"ENV_FILE"}
    others = {"JOB_ID", "JOB_ATTEMPT", "JOB_REQUIRED_MEMORY", "JOB_SUPERVISOR"}
    assert set(re.findall(rf"\b{PREFIX}([A-Z_]+)\b", ALL_TEXT)) <= known
    named = {name.removeprefix(PREFIX) for name in re.findall(r"`([A-Z]+_[A-Z_]*)`", ALL_TEXT)}
    assert named - {""} <= known | others


def test_every_metric_that_is_named_exists() -> None:
    known = {instrument.name for instrument in INSTRUMENTS}
    named = set(re.findall(r"`supervisor_([a-z_]+)`", ALL_TEXT)) - {"id"}  # the lock's supervisor_id
    assert named and named <= known


def test_every_signal_that_is_named_is_one() -> None:
    sent = {"SIGKILL", "SIGSTOP"}
    assert set(re.findall(r"\bSIG[A-Z0-9]+\b", ALL_TEXT)) <= {number.name for number in SIGNALS} | sent


def test_every_event_that_is_explained_is_logged() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (REPOSITORY / "supervisor").rglob("*.py"))
    table = rows(section((REPOSITORY / "deploy/OPERATING.md").read_text("utf-8"), "Logs"))
    explained = [name for row in table for name in names(row[0])]
    assert explained
    assert [event for event in explained if f'"{event}"' not in sources] == []


# -- the job document


def written_fields() -> set[str]:
    """Every field that a status move writes."""
    owner = transitions.Owner(supervisor_id="s", host="h", worker_pid=1, worker="s/1")
    outcome = Outcome(reason=Reason.MEMORY_EXCEEDED, error="e", exit_code=1, peak_memory_mb=1)
    verdict = Verdict(status=Status.PENDING, counter="failures", retry_after_seconds=1.0, required_memory=1)
    counted = [Verdict(status=Status.PENDING, counter=counter) for counter in ("interruptions", "losses")]
    finishes = [
        transitions.finish(1, "t", outcome, each, attempt=1, details={}, lines=[]) for each in (verdict, *counted)
    ]
    moves = [
        *finishes, transitions.lose({}, "why"), transitions.confirm(1, "t"), transitions.give_back(1, "t"),
        transitions.cancel_pending(1), transitions.request_cancel(1), transitions.retry(1), transitions.adopt(),
        transitions.adopt_without_status(), transitions.set_status(1, "t", Status.COMPLETED, ""),
    ]  # fmt: skip
    pipelines = [transitions.claim_update(owner, "t", 1.0), *(move.update for move in moves)]
    fields = {name for stages in pipelines for stage in stages for name in stage.get("$set", {})}
    return fields | set(re.findall(r'details(?:: .*? = \{|\[)"(\w+)"', inspect.getsource(Attempt.details)))


def documented_fields() -> tuple[dict[str, str], set[str]]:
    """What producers write, with its default, and what the supervisor writes."""
    text = section(REFERENCE_TEXT, "The job document")
    asked, written = text.split("Written by the supervisor:")
    defaults = {names(row[0])[0]: row[2] for row in rows(asked)}
    fields = {name for row in rows(written.split("| `reason` | when |")[0]) for name in names(row[0])}
    return defaults, fields


def test_every_field_of_the_document_is_documented() -> None:
    defaults, written = documented_fields()
    housekeeping = {"status", "created_at", "updated_at", "logs"}
    assert set(defaults) == set(JobSpec.model_fields) | housekeeping
    assert written == written_fields() - set(defaults)
    assert all(f"`{name}`" in section(README, "The job document") for name in defaults)


def test_an_import_leaves_out_what_supervisors_write() -> None:
    assert documented_fields()[1] == WRITTEN


def test_the_defaults_of_the_document_are_the_documented_ones() -> None:
    defaults, _ = documented_fields()
    for name, field in JobSpec.model_fields.items():
        shown = defaults[name]
        if field.is_required():
            assert shown == "required", name
        elif field.default is None:
            assert not names(shown), name
        else:
            assert names(shown) == [_as_shown(field.default)], name


def _as_shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_fields_of_the_lock_are_documented() -> None:
    owner = transitions.Owner(supervisor_id="s", host="h", worker_pid=1, worker="s/1")
    lock = transitions.claim_update(owner, "t", 1.0, ahead=True)[0]["$set"]["lock"]["$mergeObjects"][0]
    row = next(row for row in rows(section(REFERENCE_TEXT, "The job document")) if names(row[0]) == ["lock"])
    assert set(names(row[1])) == set(lock)


def test_statuses_and_reasons_are_documented() -> None:
    table = rows(section(REFERENCE_TEXT, "The job document").split("| `reason` | when |")[1])
    assert [names(row[0])[0] for row in table if len(row) == 2] == [reason.value for reason in Reason]
    status = next(row for row in rows(section(REFERENCE_TEXT, "The job document")) if names(row[0]) == ["status"])
    assert names(status[3]) == [status.value for status in Status]


def test_the_variables_of_a_job_are_documented() -> None:
    given = set(re.findall(r'"(JOB_[A-Z_]+)":', inspect.getsource(Worker)))
    assert given
    assert given <= set(names(section(REFERENCE_TEXT, "The job document")))


# -- HTTP


def test_every_path_of_the_server_is_documented() -> None:
    served = set(re.findall(r'"(/\w*)": self\.', inspect.getsource(server._Handler)))
    assert served >= {"/metrics", "/healthz", "/readyz"}
    assert {names(row[0])[0] for row in rows(section(REFERENCE_TEXT, "HTTP"))} == served


# -- files, links, modules


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


FILE = re.compile(r"(?<![\w./-])((?:deploy|tests|tasks|supervisor)/[\w./-]*[\w/]|[\w.-]+\.(?:service|env\.example))")


@each_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in FILE.findall(re.sub(r"\]\([^)]*\)", "", page.read_text("utf-8"))):
        assert any((base / name).exists() for base in (REPOSITORY, page.parent)), name


def test_the_drawn_layout_is_the_tree() -> None:
    drawn: set[str] = set()
    lines = section(README, "The code").split("    supervisor/\n")[1].split("    tasks/")[0].splitlines()
    for line in filter(str.strip, lines):
        words = re.split(r" {3,}|(?<=/) {1,}", line.strip())
        package = words.pop(0) if words[0].endswith("/") else ""
        drawn |= {f"{package}{name}" for name in words[0].split()}
    root = REPOSITORY / "supervisor"
    modules = {str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.py")}
    assert drawn == {module for module in modules if not module.endswith(("__init__", "__main__"))}


# -- command lines


def command_lines() -> Iterator[tuple[str, str]]:
    """Every `python -m ...` of every page: the page's name and the words behind `-m`."""
    for page in PAGES:
        for found in re.finditer(r"python3? -m ([a-z][\w.]*[^`\n]*)", page.read_text("utf-8")):
            before = page.read_text("utf-8")[: found.start()].rpartition("\n")[2]
            line = re.split(r"\s#\s|\s{2,}#?", found[1])[0].strip()
            if "`" in before and before.count("`") % 2 == 0 and "`" in found[0]:
                continue
            yield str(page.relative_to(REPOSITORY)), re.sub(r"\*+:?.*$|\s+\|.*$", "", line).rstrip(" .,;:)")


LINES = sorted(set(command_lines()))


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: value)
def test_every_command_line_is_understood(page: str, line: str) -> None:
    del page
    module, *arguments = shlex.split(line)
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
    parsers: Mapping[str, Any] = {"supervisor": commands.parser, "supervisor.producer": producer.parser}
    if module not in parsers or (module == "supervisor.producer" and not arguments):
        return
    words = [re.sub(r"[\[\]…]|\.\.\.", "", word) for word in arguments]
    try:
        chosen = parsers[module]().parse_args([word for word in words if word])
    except SupervisorError as error:
        pytest.fail(f"{line}: {error}")
    if module == "supervisor.producer" and "words" in chosen:
        ours = {name for _, parser in every_command() for name in parser._option_string_actions}
        assert not ours.intersection(chosen.words[1:]), "an option behind the script is the script's"


def test_the_command_lines_were_found() -> None:
    assert len(LINES) > 25


def test_the_documented_roles_are_the_ones_that_are_made() -> None:
    text = (REPOSITORY / "deploy/SECURITY.md").read_text("utf-8")
    documented = [names(row[0])[0] for row in rows(section(text, "Users of MongoDB"))]
    assert documented == [command["createRole"] for command in role_commands()]


@each_page
def test_every_python_block_compiles(page: Path) -> None:
    for language, source in FENCE.findall(page.read_text("utf-8")):
        if language == "python":
            compile(source, str(page), "exec")
