#!/bin/sh
# The paper's Figure 3: first and last frames uncached, by TeaCache and by ERTACache, side by side.
# MODEL=full PROMPTS=prompts.txt sh scripts/reproduce/figure3.sh: the real checkpoints at the paper's λ (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo, or full
PROMPTS=${PROMPTS:-}          # a file with one prompt per line; empty: held-out captions of the demo
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
COUNT=${COUNT:-3}             # prompts to show
FOLDERS=${FOLDERS:-}          # empty: all four
REPEATS=${REPEATS:-3}         # timed runs, cached and uncached in turn; 0: no latency
OUT=${OUT:-runs/reproduce/figure3-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh
[ -z "$PROMPTS" ] || set -- --prompts "$PROMPTS" "$@"
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/figures.py figure3 --model "$MODEL" --folders "$FOLDERS" --count "$COUNT" \
    --latency-repeats "$REPEATS" --out "$OUT" "$@"
