#!/bin/sh
# The paper's Figure 2: (a) distances between cached and computed features, and what TeaCache expects;
# (b) trajectories with and without timestep adjustment.
# MODEL=full PROMPTS=coco.txt sh scripts/reproduce/figure2.sh: the real checkpoint at the paper's λ (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo, or full
PROMPTS=${PROMPTS:-}          # a file with one prompt per line; empty: held-out captions of the demo
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
COUNT=${COUNT:-8}             # prompts for (a)
FOLDER=${FOLDER:-ERTACache4FLUX}
OUT=${OUT:-runs/reproduce/figure2-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh report
[ -z "$PROMPTS" ] || set -- --prompts "$PROMPTS" "$@"
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/figures.py figure2 --model "$MODEL" --folders "$FOLDER" --count "$COUNT" \
    --out "$OUT" "$@"
