#!/bin/sh
# The paper's Table 4: memory and latency, beside the paper's numbers.
# MODEL=random: the real architectures at full size with random weights (needs a GPU, no download).
# MODEL=full PROMPTS=coco.txt: the real checkpoints (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo: the architectures at toy size; random; full
PROMPTS=${PROMPTS:-}          # a file with one prompt per line, for MODEL=full
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
FOLDERS=${FOLDERS:-}          # empty: ERTACache4FLUX,ERTACache4OpenSora1.2
REPEATS=${REPEATS:-5}         # timed runs, cached and uncached in turn
OUT=${OUT:-runs/reproduce/table4-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh
repeats=--repeats
[ "$MODEL" != full ] || repeats=--latency-repeats  # the option's name in evaluate.py
[ -z "$PROMPTS" ] || set -- --prompts "$PROMPTS" "$@"
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/tables.py table4 --model "$MODEL" --folders "$FOLDERS" --extra "" \
    $repeats "$REPEATS" --out "$OUT" "$@"
