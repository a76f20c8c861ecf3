"""`python -m supervisor`."""

from __future__ import annotations

from typing import NoReturn

from supervisor.cli import main as commands


def main() -> NoReturn:
    """The command of this name."""
    commands.leave(commands.main())


if __name__ == "__main__":
    main()
