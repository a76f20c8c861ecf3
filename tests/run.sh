#!/bin/sh
# Sets up everything and checks everything: the direction of imports, lint, types, and all tests on a real MongoDB.
#   sh tests/run.sh                  all of it
#   sh tests/run.sh tests/unit -x    only these tests (arguments go to pytest)
set -eu
cd "$(dirname "$0")/.."
. deploy/environment.sh
make_environment .venv-tests '.[embedded,dev]'
bin=$(pwd)/.venv-tests/bin
if [ $# -eq 0 ]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
    "$bin/lint-imports"
    # Most tests wait for processes: three at a time, a file's tests one after the other.
    set -- --numprocesses 3 --dist loadfile
fi
exec "$bin/python" -m pytest "$@"
