#!/bin/sh
# Measure methods on problems from easy to hard, one file of rows each in OUT: every demo at its own guidance, at 1.5 and
# 2 times it, and in 20 and 12 steps; the closed-form problem from smooth to stiff, and with so much guidance that it is
# as hard as published checkpoints. The same command goes on where it was.
# ONLY=FLUX,closed sh scripts/bench/hardness.sh: the problems whose names begin so.
set -eu
cd -- "$(dirname -- "$0")/../.."
SOLVERS=oss,oss-solver,neuralsolver,ays,lemica,dpcache,budcache,spectrum,spectrum-blend
METHODS=${METHODS:-fewer-steps,fewer-steps-tuned,fewer-steps-ab2,least-squares,ertacache,budget,$SOLVERS}
CACHES=${CACHES:-taylorseer,teacache,easycache,first-block}  # need a transformer: not on the closed-form problem
SPEEDUPS=${SPEEDUPS:-2,3,5}
COUNT=${COUNT:-16}
ONLY=${ONLY:-}
OUT=${OUT:-runs/hardness}
mkdir -p "$OUT"

measure() {  # NAME FOLDER METHODS FLAG…
    name=$1 folder=$2 methods=$3
    shift 3
    case ",$ONLY" in
        ,) ;;
        *",${name%%-*}"*) ;;
        *) return 0 ;;
    esac
    .venv/bin/python scripts/evaluate.py "$folder" --methods "$methods" --speedups "$SPEEDUPS" --count "$COUNT" \
        --batch-size 8 --latency-repeats 0 --json "$OUT/$name.json" "$@" >"$OUT/$name.md"
    echo "$OUT/$name.json"
}

demo() {  # NAME FOLDER GUIDANCES: the first one is the demo's own, for which plans are shipped
    name=$1 folder=$2
    shift 2
    measure "$name" "$folder" "$METHODS,$CACHES"
    for guidance in "$@"; do
        measure "$name-guidance-$guidance" "$folder" "$METHODS,$CACHES" --guidance "$guidance" --plans "$OUT/none"
    done
    measure "$name-steps-20" "$folder" "$METHODS,$CACHES" --steps 20 --plans "$OUT/none"
    measure "$name-steps-12" "$folder" "$METHODS,$CACHES" --steps 12 --speedups 2,3 --plans "$OUT/none"  # 5×: two calls
}

for width in 0.05 0.1 0.3 1; do
    for guidance in 1 3.5 5; do
        measure "closed-$width-$guidance" scripts/bench/closed_form "$METHODS" --model "b=$width" --guidance "$guidance"
    done
    measure "closed-$width-steps-12" scripts/bench/closed_form "$METHODS" --model "b=$width" --steps 12
done
for width in 0.1 0.3 1; do
    for guidance in 8 12; do
        measure "closed-$width-shift-1-$guidance-steps-12" scripts/bench/closed_form "$METHODS" \
            --model "b=$width,shift=1" --guidance "$guidance" --steps 12
    done
    measure "closed-$width-shift-1-12" scripts/bench/closed_form "$METHODS" --model "b=$width,shift=1" --guidance 12
done
demo FLUX ERTACache4FLUX 5.25 7
demo OpenSora ERTACache4OpenSora1.2 10.5 14
demo CogVideoX ERTACache4CogVideoX-2B 9 12
demo Wan ERTACache4Wan2.1 7.5 10
