#!/bin/sh
# Set up and run the test suite. `test.sh --fast` leaves the slow tests out; other arguments go to pytest.
set -eu
cd -- "$(dirname -- "$0")/.."
sh scripts/setup.sh dev
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
exec .venv/bin/python -m pytest "$@"
