#!/bin/sh
# Runs the benchmarks in a virtual environment of their own; the arguments go to `python -m tests.benchmarks`.
#   sh tests/benchmarks/run.sh --quick          small sizes, a few minutes
#   sh tests/benchmarks/run.sh                  everything; leave the machine alone meanwhile
# redis-server must be installed (Debian: apt-get install redis-server).
set -eu
cd "$(dirname "$0")/../.."
. deploy/environment.sh
# A plain path file instead of an import hook: the hook would slow down every `python script` of the polling worker.
export PIP_CONFIG_SETTINGS=editable_mode=compat
make_environment .venv-benchmarks '.[embedded,benchmark]'
exec .venv-benchmarks/bin/python -m tests.benchmarks "$@"
