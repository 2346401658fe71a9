#!/bin/sh
# ERTACache for FLUX: edit the values or set them before the command (LAMBDA=0.17 sh run.sh). More flags: README.md.
set -eu
cd -- "$(dirname -- "$0")"
[ -z "${SPEEDUP:-}${BUDGET:-}" ] || [ -z "${LAMBDA:-}${SITE:-}" ] || {
    echo "error: LAMBDA and SITE are of threshold plans: leave them out beside SPEEDUP or BUDGET" >&2; exit 2; }
MODEL=${MODEL:-demo}          # demo, a local directory, or black-forest-labs/FLUX.1-dev
PROMPT=${PROMPT:-}            # one prompt; empty: the prompts of PROMPTS
PROMPTS=${PROMPTS:-}          # a file with one prompt per line; empty: prompts/demo.txt, or prompts/examples.txt
SEED=${SEED:-1000}            # seed of the first prompt; the next have SEED + 1, …
STEPS=${STEPS:-30}            # T, steps of the uncached run
GUIDANCE=${GUIDANCE:-3.5}
LAMBDA=${LAMBDA:-0.09}        # λ: lower is finer, higher is faster; a new value is calibrated first
SPEEDUP=${SPEEDUP:-}          # in place of LAMBDA: 2 computes exactly half of the steps, those that matter most
BUDGET=${BUDGET:-}            # in place of LAMBDA: the number of computed steps
EFFORT=${EFFORT:-quick}       # quick, normal, thorough or minutes: what the calibration of a new plan may cost
SITE=${SITE:-output}          # where the residual is cached: output or blocks
COMPARE=${COMPARE:-yes}       # yes or no: also run uncached, time both, write comparison.png
REPEATS=${REPEATS:-3}         # of COMPARE=yes: timed runs, cached and uncached in turn; the median counts
BATCH=${BATCH:-4}             # prompts per call
OFFLOAD=${OFFLOAD:-none}      # none, model or sequential: less GPU memory, slower
OUT=${OUT:-sample}
[ -n "$BUDGET$SPEEDUP" ] || set -- --threshold "$LAMBDA" --site "$SITE" "$@"
set -- ${BUDGET:+--budget "$BUDGET"} ${SPEEDUP:+--speedup "$SPEEDUP"} "$@"
case $COMPARE in
    yes) set -- --compare --repeats "$REPEATS" "$@" ;;
    no) ;;
    *) echo "error: COMPARE=$COMPARE: give yes or no" >&2; exit 2 ;;
esac
[ -z "$PROMPT" ] || set -- --prompt "$PROMPT" "$@"
[ -z "$PROMPTS" ] || set -- --prompts "$PROMPTS" "$@"
sh ../scripts/setup.sh
exec ../.venv/bin/python generate.py --model "$MODEL" --seed "$SEED" --steps "$STEPS" --guidance "$GUIDANCE" \
    --effort "$EFFORT" --batch-size "$BATCH" --offload "$OFFLOAD" --out "$OUT" "$@"
