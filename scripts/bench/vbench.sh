#!/bin/sh
# VBench scores of videos, by its own package: sh scripts/bench/vbench.sh FOLDER [FOLDER …]
# A folder is, for example, the sample/ of a model folder. Needs a GPU, and the network in the first run, for VBench's weights.
# The package needs old versions of torch and transformers: install it in an environment of its own (pip install vbench) and
# set VBENCH to its command.
set -eu
VBENCH=${VBENCH:-vbench}      # the command of the package
MODE=${MODE:-custom_input}    # any videos; vbench_standard: a folder with PROMPT-0.mp4 … PROMPT-4.mp4 of each VBench prompt
DIMENSIONS=${DIMENSIONS:-}    # empty: the six that suit any video; with vbench_standard all sixteen
OUT=${OUT:-runs/vbench}       # output, with one folder per folder of videos
any="subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality"
[ "$MODE" = custom_input ] || any="$any temporal_flickering object_class multiple_objects human_action color \
    spatial_relationship scene temporal_style appearance_style overall_consistency"
[ $# -gt 0 ] || { echo "error: no folder of videos: sh scripts/bench/vbench.sh ERTACache4Wan2.1/sample" >&2; exit 2; }
command -v "$VBENCH" >/dev/null || { echo "error: no command $VBENCH: pip install vbench, or name it in VBENCH" >&2; exit 2; }
for folder; do
    ls "$folder"/*.mp4 >/dev/null 2>&1 || { echo "error: no .mp4 in $folder: name a folder of videos" >&2; exit 2; }
done
for folder; do
    for dimension in ${DIMENSIONS:-$any}; do
        "$VBENCH" evaluate --mode="$MODE" --dimension "$dimension" --videos_path "$folder" \
            --output_path "$OUT/$(basename -- "$(cd -- "$folder" && pwd)")"
    done
done
