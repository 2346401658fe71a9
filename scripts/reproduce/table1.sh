#!/bin/sh
# The paper's Table 1: video models, each method at the paper's speed-up, beside the paper's numbers.
# MODEL=full PROMPTS=vbench.txt sh scripts/reproduce/table1.sh: the real checkpoints at the paper's λ (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo, or full
PROMPTS=${PROMPTS:-}          # a file with one prompt per line; empty: held-out captions of the demo
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
COUNT=${COUNT:-16}            # how many of the held-out captions; with PROMPTS all of the file are measured
FOLDERS=${FOLDERS:-}          # empty: ERTACache4OpenSora1.2,ERTACache4CogVideoX-2B,ERTACache4Wan2.1
EXTRA=${EXTRA-fewer-steps,budget}  # methods in addition to the paper's; empty: none
REPEATS=${REPEATS:-3}         # timed runs, cached and uncached in turn; 0: no latency
OUT=${OUT:-runs/reproduce/table1-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh
if [ -n "$PROMPTS" ]; then set -- --prompts "$PROMPTS" "$@"; else set -- --count "$COUNT" "$@"; fi
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/tables.py table1 --model "$MODEL" --folders "$FOLDERS" --extra "$EXTRA" \
    --latency-repeats "$REPEATS" --out "$OUT" "$@"
