# Makes a virtual environment with this package; sourced by deploy/demo.sh and tests/run.sh.

find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON to its path" >&2
    exit 2
}

# make_environment DIRECTORY REQUIREMENT: does nothing when it was made for this pyproject.toml already.
make_environment() {
    stamp="$1/.made-for"
    wanted="$2 $(cksum < pyproject.toml) $(pwd)"
    if [ -x "$1/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    echo "Setting up $1 with $("$python" --version) ..." >&2
    "$python" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$2"
    echo "$wanted" > "$stamp"
}
