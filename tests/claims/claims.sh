#!/usr/bin/env bash
# Every claim of the method in miniature: train, measure, keep the numbers.
#
#   tests/claims/claims.sh             what has no result yet, three seeds, one command after the other
#   tests/claims/claims.sh --list      what is done, and what is left
#   tests/claims/claims.sh 3 7         these claims alone
#   SEEDS=1 OMP_NUM_THREADS=1 tests/claims/claims.sh      one seed (on two cores: a seed on each is a little faster)
#   python tests/claims/report.py      results -> the tables and figures of RESULTS.md
#
# It can be stopped at any time and goes on where it was. A result is kept as tests/claims/results/NETWORK/MEASUREMENT.SEED.json
# with the commands that made it, and is made again when these have changed. Networks and logs are in runs/claims (WORK),
# with a copy of the scripts for each patch. An alternative to the method is a patch beside this file.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/claims work=$(realpath -m "${WORK:-runs/claims}") python=${PYTHON:-python} seeds=${SEEDS:-0 1 2}
results=$(realpath -m "${RESULTS:-$here/results}")

# Small batches: at equal samples they learn more here. Dense depth, much depth-to-image (slow to learn), no teacher but where
# it is the question.
t2i="train_t2i.py --steps 2000 --batch-size 8 --lr 3e-3"
forcing="train_forcing.py --steps 1200 --batch-size 8 --lr 3e-3"
modes="--p-i2d 0.25 --p-d2i 0.5"
alone="--distill-hi 0 --distill-lo 0"

# network, patch, command that trains it; @NAME is the last checkpoint of another network, of the same seed
networks="
t2i              -             $t2i
method           -             $forcing --init @t2i $modes --sparsity dense
shared           shared        $forcing --init @t2i $modes --sparsity dense
plain            -             $forcing --init @t2i $modes --sparsity dense $alone

sparse-10        -             $forcing --init @t2i $modes --sparsity 0.1 $alone
sparse-2         -             $forcing --init @t2i $modes --sparsity 0.02 $alone
lidar            -             $forcing --init @t2i $modes --sparsity lidar $alone
sfm              -             $forcing --init @t2i $modes --sparsity sfm $alone
filled-10        filled        $forcing --init @t2i $modes --sparsity 0.1 $alone
filled-2         filled        $forcing --init @t2i $modes --sparsity 0.02 $alone

t2i-short        -             train_t2i.py --steps 500 --batch-size 8 --lr 3e-3
short            -             $forcing --init @t2i-short $modes --sparsity dense $alone
plain-scratch    -             $forcing --init none $modes --sparsity dense

t2i-narrow       presets       $t2i --preset narrow
narrow           presets       $forcing --init @t2i-narrow $modes --sparsity dense $alone
narrow-scratch   presets       $forcing --init none --preset narrow $modes --sparsity dense
t2i-wide         presets       $t2i --preset wide
wide             presets       $forcing --init @t2i-wide $modes --sparsity dense $alone
wide-scratch     presets       $forcing --init none --preset wide $modes --sparsity dense

detokenizer-0    presets       $forcing --init @t2i --preset detokenizer-0 $modes --sparsity dense $alone
detokenizer-2    presets       $forcing --init @t2i --preset detokenizer-2 $modes --sparsity dense $alone
logit-normal     logit-normal  $forcing --init @t2i $modes --sparsity dense $alone
zeros            zeros         $forcing --init @t2i $modes --sparsity 0.1 $alone
velocity         velocity      $forcing --init @t2i $modes --sparsity dense $alone
unmixed          unmixed       $forcing --init @t2i $modes --sparsity dense $alone
modes-none       -             $forcing --init @t2i --p-i2d 0 --p-d2i 0 --sparsity dense $alone
modes-paper      -             $forcing --init @t2i --p-i2d 0.2 --p-d2i 0.2 --sparsity dense $alone
modes-i2d        -             $forcing --init @t2i --p-i2d 0.5 --p-d2i 0.25 --sparsity dense $alone
"

# claims that need it, network, measurement, command
measurements="
1,7 method       image         evaluate.py image
1   method       depth         evaluate.py depth
1,8 method       follow-1      evaluate.py follow
1,8 method       follow-0      evaluate.py follow --strength 0
1,6 method       order-5       evaluate.py joint --steps 32 --order 5

2   method       judged        evaluate.py follow --judge @method
2   shared       judged        evaluate.py follow --judge @method
2   method       steps-2       evaluate.py depth --steps 2
2   shared       steps-2       evaluate.py depth --steps 2
2   method       steps-8       evaluate.py depth --steps 8
2   shared       steps-8       evaluate.py depth --steps 8
2   method       steps-32      evaluate.py depth --steps 32
2   shared       steps-32      evaluate.py depth --steps 32

3,4,5,9 plain    depth         evaluate.py depth
3,9 sparse-10    depth         evaluate.py depth
3   sparse-2     depth         evaluate.py depth
3   lidar        depth         evaluate.py depth
3   sfm          depth         evaluate.py depth
3   filled-10    depth         evaluate.py depth
3   filled-2     depth         evaluate.py depth

4,5 plain-scratch depth         evaluate.py depth
4   short        depth         evaluate.py depth

5   narrow       depth         evaluate.py depth
5   narrow-scratch depth       evaluate.py depth
5   wide         depth         evaluate.py depth
5   wide-scratch depth         evaluate.py depth

6   method       order-3       evaluate.py joint --steps 32 --order 3
6   method       order-1       evaluate.py joint --steps 32 --order 1
6   method       order-0       evaluate.py joint --steps 32 --order 0
6   method       order--1      evaluate.py joint --steps 32 --order -1
6   method       order--3      evaluate.py joint --steps 32 --order -3
6   method       order--5      evaluate.py joint --steps 32 --order -5

7   t2i          image         evaluate.py image
7   plain        image         evaluate.py image
7   plain        drift         drift.py --teacher @t2i
7   method       drift         drift.py --teacher @t2i

8   method       follow-0.5    evaluate.py follow --strength 0.5
8   method       follow-0.7    evaluate.py follow --strength 0.7
8   method       follow-0.85   evaluate.py follow --strength 0.85
8   method       follow-0.95   evaluate.py follow --strength 0.95

9   logit-normal depth         evaluate.py depth
9   zeros        depth         evaluate.py depth
9   velocity     depth         evaluate.py depth
9   unmixed      depth         evaluate.py depth
9   detokenizer-0 depth         evaluate.py depth
9   detokenizer-2 depth         evaluate.py depth
9   modes-none   depth         evaluate.py depth
9   modes-paper  depth         evaluate.py depth
9   modes-i2d    depth         evaluate.py depth
9   plain        judged        evaluate.py follow --judge @plain
9   unmixed      judged        evaluate.py follow --judge @plain
9   modes-none   judged        evaluate.py follow --judge @plain
9   modes-paper  judged        evaluate.py follow --judge @plain
9   modes-i2d    judged        evaluate.py follow --judge @plain
9   detokenizer-0 judged        evaluate.py follow --judge @plain
9   detokenizer-2 judged        evaluate.py follow --judge @plain
9   logit-normal judged        evaluate.py follow --judge @plain
9   velocity     judged        evaluate.py follow --judge @plain
9   sparse-10    judged        evaluate.py follow --judge @plain
9   zeros        judged        evaluate.py follow --judge @plain
"

row() {  # of a network: its patch and command, single spaces
    awk -v name="$1" '$1 == name { $1 = ""; print substr($0, 2); exit }' <<<"$networks"
}

recipe() {  # all that leads to a network, in a line
    local line other
    line=$(row "$1")
    [ -n "$line" ] || { echo "claims.sh: no network is called $1" >&2; exit 2; }
    for other in $(grep -o '@[^ ]*' <<<"$line" | tr -d @); do recipe "$other"; done
    echo -n "$line; "
}

code() {  # a folder with the scripts as they are now, patched
    local patch=/dev/null folder
    [ "$1" = - ] || patch=$PWD/$here/$1.patch
    folder=$work/code/$1-$(cat ./*.py $here/drift.py "$patch" | cksum | cut -d ' ' -f 1)
    if [ ! -e "$folder" ]; then
        mkdir -p "$folder.$$" && cp ./*.py $here/drift.py "$folder.$$"
        [ "$1" = - ] || (cd "$folder.$$" && GIT_CEILING_DIRECTORIES=$work/code git apply "$patch")
        mv -T "$folder.$$" "$folder" 2>/dev/null || rm -r "$folder.$$"  # another process was first
    fi
    echo "$folder"
}

run() {  # network, seed, folder for what it writes, command
    local patch command=$4 other
    patch=$(row "$1" | cut -d ' ' -f 1)
    for other in $(grep -o '@[^ ]*' <<<"$command" | tr -d @); do
        train "$other" "$2"
        command=${command//@$other/$work/$other.$2/last.pt}
    done
    mkdir -p "$3"
    echo "$(date +%T) seed $2, $1: $4" >&2
    # shellcheck disable=SC2086  # a command is words
    $python "$(code "$patch")"/$command --out "$3" >"$3/log" 2>&1 </dev/null || { tail -n 5 "$3/log" >&2; echo "claims.sh: stopped; $3/log says why" >&2; exit 1; }
}

train() {  # network, seed
    local folder=$work/$1.$2
    [ "$(cat "$folder/recipe" 2>/dev/null)" = "$(recipe "$1")" ] || rm -rf "$folder"
    [ ! -e "$folder/done" ] || return 0
    mkdir -p "$folder" && recipe "$1" >"$folder/recipe"
    run "$1" "$2" "$folder" "$(row "$1" | cut -d ' ' -f 2-) --seed $2 --resume --keep 1 --sample-every 100000"
    touch "$folder/done"
}

measure() {  # network, seed, measurement, command
    local out=$work/$1.$2/$3 result=$results/$1/$3.$2.json
    train "$1" "$2"
    run "$1" "$2" "$out" "$4 --checkpoint @$1"
    mkdir -p "$results/$1"
    $python - "$out/results.json" "$(recipe "$1")$4" >"$result.new" <<'END' && mv "$result.new" "$result"
import json, sys
settings = ("depth_scale", "depth_min", "depth_max", "measured", "strength", "order", "cfg")  # the command has them
numbers = {k: round(x, 6) for k, x in json.load(open(sys.argv[1])).items() if isinstance(x, float) and k not in settings}
print(json.dumps({"made by": sys.argv[2]} | numbers, indent=1))
END
}

list= chosen=" "
for word in "$@"; do
    case $word in
    --list) list=yes ;;
    [1-9]) chosen+="$word " ;;
    *) sed -n '2,/^set/{/^#/p}' "$0" | cut -c 3-; exit 2 ;;
    esac
done
done=0 left=0
while read -r claims network name command; do
    [ -n "$claims" ] || continue
    [ "$chosen" = " " ] || grep -q "[${chosen// /}]" <<<"$claims" || continue
    for seed in $seeds; do
        if grep -qsF "\"$(recipe "$network")$command\"" "$results/$network/$name.$seed.json"; then
            done=$((done + 1))
            [ -z "$list" ] || echo "done: claim $claims, seed $seed, $network: $command"
        elif [ -n "$list" ]; then
            left=$((left + 1))
            echo "left: claim $claims, seed $seed, $network: $command"
        else
            measure "$network" "$seed" "$name" "$command"
            done=$((done + 1))
        fi
    done
done <<<"$measurements"
echo "$done measurements done, $left left"
