#!/bin/sh
# The paper's Table 3: ablation of the method on Wan2.1 and FLUX, beside the paper's numbers.
# MODEL=full PROMPTS=vbench.txt sh scripts/reproduce/table3.sh: the real checkpoints at the paper's λ (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo, or full
PROMPTS=${PROMPTS:-}          # a file with one prompt per line; empty: held-out captions of the demo
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
COUNT=${COUNT:-16}            # how many of the held-out captions; with PROMPTS all of the file are measured
FOLDERS=${FOLDERS:-}          # empty: ERTACache4Wan2.1,ERTACache4FLUX
CLIP=${CLIP:-}                # hub id or directory of a CLIP model, for the CLIP similarity; empty: none
OUT=${OUT:-runs/reproduce/table3-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh
if [ -n "$PROMPTS" ]; then set -- --prompts "$PROMPTS" "$@"; else set -- --count "$COUNT" "$@"; fi
[ -z "$CLIP" ] || set -- --clip "$CLIP" "$@"
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/tables.py table3 --model "$MODEL" --folders "$FOLDERS" --extra "" \
    --latency-repeats 0 --out "$OUT" "$@"
