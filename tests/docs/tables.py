"""What the code says of itself, as text for the documentation.

    python -m tests.docs.tables      writes settings.env.example, and the tables between `<!-- generated: NAME -->` and
                                     `<!-- end -->` in deploy/REFERENCE.md

`test_docs.py` fails when what is written there differs from what the code says.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from supervisor import producer
from supervisor.cli import main as commands
from supervisor.metrics import INSTRUMENTS
from supervisor.settings import PREFIX, Settings
from supervisor.supervisor import SIGNALS

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "settings.env.example"
REFERENCE = REPOSITORY / "deploy" / "REFERENCE.md"
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

HEAD = """\
# Every setting with its default, commented out. Copy this file to settings.env in the working directory of the
# supervisor (SUPERVISOR_ENV_FILE names another file) and change what you need. A variable of the same name in the
# environment comes first. A wrong value stops the start, and the message names the setting.
"""


def settings_example() -> str:
    """The text of settings.env.example."""
    entries = []
    for name, field in Settings.model_fields.items():
        value = "" if _named_default(field) else _plain(field.default)
        entries.append(f"# {field.description}\n#{PREFIX}{name.upper()}={value}\n")
    return "\n".join([HEAD, *entries])


def _settings() -> Iterator[str]:
    yield from _head("`SUPERVISOR_` …", "default", "meaning")
    for name, field in Settings.model_fields.items():
        named = _named_default(field)
        default = named or (f"`{_plain(field.default)}`" if _plain(field.default) else "empty")
        meaning = (field.description or "").replace(f" Default: {named}.", "")
        yield _row(f"`{name.upper()}`", default, meaning)


def _named_default(field: Any) -> str | None:
    """The default in words, where its value depends on the host."""
    found = re.search(r" Default: (.+)\.$", field.description or "")
    return found[1] if found else None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None or value is PydanticUndefined else str(value)


def _metrics() -> Iterator[str]:
    yield from _head("`supervisor_` …", "kind", "labels", "meaning")
    for instrument in INSTRUMENTS:
        labels = []
        for position, label in enumerate(instrument.labels):
            values = dict.fromkeys(known[position] for known in instrument.known)
            labels.append(f"`{label}`" + (f": {', '.join(value or 'empty' for value in values)}" if values else ""))
        yield _row(f"`{instrument.name}`", instrument.kind, "; ".join(labels), instrument.help)


def _signals() -> Iterator[str]:
    yield from _head("signal", "what the supervisor does")
    for number, act in SIGNALS.items():
        yield _row(f"`{number.name}`", _first_sentences(act))


def _first_sentences(act: object) -> str:
    return " ".join((act.__doc__ or "").split())


def _commands() -> Iterator[str]:
    for prog, parser in every_command():
        arguments = [_spelled(action) for action in parser._get_positional_actions()]
        yield f"**`{' '.join([prog, *arguments])}`**: {parser.description or _help_of(prog)}"
        yield ""
        yield from _head("argument", "meaning")
        for action in parser._actions:
            if action.help and not isinstance(action, argparse._HelpAction):
                yield _row(f"`{_spelled(action)}`", action.help.replace("%%", "%"))
        yield ""


def every_command() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command line without its arguments, and the parser of these."""
    for top in (commands.parser(), producer.parser()):
        yield from _leaves(top.prog, top)


def _leaves(prog: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not children:
        yield prog, parser
    for action in children:
        for name, child in action.choices.items():
            yield from _leaves(f"{prog} {name}", child)


def _help_of(prog: str) -> str:
    """The sentence that the parser above shows of a command."""
    words = prog.split()
    parser: Any = producer.parser() if words[2] == "supervisor.producer" else commands.parser()
    sentence = ""
    for word in words[3:]:
        action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        sentence = next(str(choice.help) for choice in action._choices_actions if choice.dest == word)
        parser = action.choices[word]
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _spelled(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest) + (" …" if action.nargs in ("+", "*") else "")
    value = "" if action.nargs == 0 else " " + str(action.metavar or _choices(action) or action.dest.upper())
    return ", ".join(action.option_strings) + value


def _choices(action: argparse.Action) -> str:
    return "|".join(map(str, action.choices)) if action.choices else ""


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


TABLES = {"settings": _settings, "metrics": _metrics, "signals": _signals, "commands": _commands}


def with_tables(text: str) -> str:
    """The text, with every generated part as the code has it now."""

    def renewed(found: re.Match[str]) -> str:
        return found[1] + "\n".join(TABLES[found[2]]()).rstrip() + "\n" + found[4]

    return GENERATED.sub(renewed, text)


if __name__ == "__main__":
    EXAMPLE.write_text(settings_example(), "utf-8")
    REFERENCE.write_text(with_tables(REFERENCE.read_text("utf-8")), "utf-8")
