#!/bin/sh
# Create .venv at the root with the tested versions; does nothing when it is up to date.
# `setup.sh EXTRA` also installs an extra of pyproject.toml: dev, report, peers, …
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
extra=${1:-}
venv=$root/.venv
stamp=$venv/.ready-${extra:-base}-$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum | tr ' ' '-')
[ ! -f "$stamp" ] || exit 0

if [ ! -x "$venv/bin/python" ]; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 none; do
        [ "$python" != none ] || { echo "error: Python 3.10 or newer is needed: install it first" >&2; exit 2; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    done
    "$python" -m venv "$venv" || { echo "error: $python has no venv module: install python3-venv" >&2; exit 2; }
fi
echo "setting up $venv (once, a few minutes)" >&2
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" \
    -e "$root${extra:+[$extra]}" >&2
: >"$stamp"
[ -z "$extra" ] || : >"$(echo "$stamp" | sed "s/ready-$extra/ready-base/")"  # an extra includes the base
