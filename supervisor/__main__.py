"""`python -m supervisor`."""

from __future__ import annotations

from typing import NoReturn

from supervisor.installation import require_whole


def main() -> NoReturn:
    """The command of this name."""
    require_whole()
    from supervisor.cli import main as commands

    commands.leave(commands.main())


if __name__ == "__main__":
    main()
