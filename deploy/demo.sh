#!/bin/sh
# Sets up everything, runs the supervisor on the embedded MongoDB with the three sample jobs, and shows what happens.
#   sh deploy/demo.sh           until the jobs have ended
#   sh deploy/demo.sh --stay    then keeps the supervisor running in the foreground (Ctrl-C drains it)
set -eu
cd "$(dirname "$0")/.."
. deploy/environment.sh
make_environment .venv '.[embedded]'
exec .venv/bin/python deploy/demo.py "$@"
