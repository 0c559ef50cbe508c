#!/usr/bin/env bash
# Nine claims of the method in miniature, on Linux: train, measure, keep the numbers.
#
#   tests/claims/claims.sh             what has no result yet, three seeds, one command after the other
#   tests/claims/claims.sh --list      what is done, and what is left
#   tests/claims/claims.sh 3 7         these claims alone
#   SEEDS="1" OMP_NUM_THREADS=1 tests/claims/claims.sh    seed 1 alone; a call for each seed is a little faster
#   RESULTS=runs/again tests/claims/claims.sh 8           again, since the committed results leave nothing to do
#   python tests/claims/report.py      results -> the tables and figures of RESULTS.md
#
# You can stop it at any time and start it again. A result is tests/claims/results/NETWORK/MEASUREMENT.SEED.json and
# names the commands that made it. It is made again if one of them changes, or a line that a patch adds, or judge.pt.
# It is not made again if the scripts change: then delete it. Networks and logs are in runs/claims (WORK), with a copy
# of the scripts for each patch. A patch beside this file is an alternative to the method.
#
# The results were measured with an earlier version of the scripts, whose settings $run and $guided name. Since then,
# - --p-i2d and --p-d2i became --p-clean, judge.pt was assets/nano.pt, and the results were edited to the new names;
# - with the same flags, learning rates are 2 to 4% lower after the warm-up;
# - depth starts with weights of the image; before, they were random, except its modulation.
# So a new run gives other numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/claims
work=$(realpath -m "${WORK:-runs/claims}")
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}
results=$(realpath -m "${RESULTS:-$here/results}")

# Small batches learn more here at equal samples. Depth is dense and there is no teacher unless that is the question.
# Image from depth is learnt late and suddenly: it has a large share, and 4,000 steps in two runs (-long) where it is
# measured.
recipe="--batch-size 8 --lr 3e-3 --beta2 0.95 --weight-decay 0 --cooldown 1"
run="$recipe --seed SEED --resume --keep 1 --sample-every 100000"
forcing="train_forcing.py $run --steps 1200"
modes="--p-clean rgb=0.25,depth=0.5"
alone="--distill-hi 0 --distill-lo 0"
plain="$forcing --init @t2i/last.pt $alone $modes"
more="train_forcing.py $run --steps 1600 $alone --sparsity dense --seed 10SEED"  # other scenes and noise

# network, patch, command that trains it; @NAME is the folder of another network, of the same seed
networks="
t2i              -             train_t2i.py $run --steps 2000
plain            -             $plain --sparsity dense

plain-2400       -             $plain --sparsity dense --steps 2400
plain-long       -             $more --init @plain-2400/last.pt $modes
shared-2400      shared        $plain --sparsity dense --steps 2400
shared-long      shared        $more --init @shared-2400/last.pt $modes
unheld-2400      -             $plain --sparsity dense --steps 2400 --p-clean rgb=0,depth=0
unheld-long      -             $more --init @unheld-2400/last.pt --p-clean rgb=0,depth=0

sparse-10        -             $plain --sparsity 0.1
sparse-2         -             $plain --sparsity 0.02
lidar            -             $plain --sparsity lidar
sfm              -             $plain --sparsity sfm
filled-10        filled        $plain --sparsity 0.1
filled-2         filled        $plain --sparsity 0.02

plain-scratch    -             $forcing --init none $modes --sparsity dense
t2i-short        -             train_t2i.py $run --steps 500
short            -             $forcing --init @t2i-short/last.pt $alone $modes --sparsity dense

t2i-narrow       presets       train_t2i.py $run --steps 2000 --preset narrow
narrow           presets       $forcing --init @t2i-narrow/last.pt $alone $modes --sparsity dense
narrow-scratch   presets       $forcing --init none --preset narrow $modes --sparsity dense
t2i-wide         presets       train_t2i.py $run --steps 2000 --preset wide
wide             presets       $forcing --init @t2i-wide/last.pt $alone $modes --sparsity dense
wide-scratch     presets       $forcing --init none --preset wide $modes --sparsity dense

indoors          indoors       data.py --split val --count 128
rooms            rooms         data.py --split train --count 256
rooms-taught     -             $forcing --init @t2i/last.pt --distill-hi 0.5 --distill-lo 0.05 $modes --sparsity dense \
                               --data @rooms --workers 0
rooms-taught-10  -             $forcing --init @t2i/last.pt --distill-hi 5 --distill-lo 0.5 $modes --sparsity dense \
                               --data @rooms --workers 0
rooms-untaught   -             $plain --sparsity dense --data @rooms --workers 0

detokenizer-0    presets       $plain --sparsity dense --preset detokenizer-0
detokenizer-2    presets       $plain --sparsity dense --preset detokenizer-2
logit-normal     logit-normal  $plain --sparsity dense
velocity         velocity      $plain --sparsity dense
unmixed          unmixed       $plain --sparsity dense
zeros            zeros         $plain --sparsity 0.1
modes-none       -             $forcing --init @t2i/last.pt $alone --p-clean rgb=0,depth=0 --sparsity dense
modes-paper      -             $forcing --init @t2i/last.pt $alone --p-clean rgb=0.2,depth=0.2 --sparsity dense
"

# Depth in generated images is found by a network that is not compared. In its default two steps this depth is smooth,
# and so is depth that is generated late in few steps. $joint finds it in 32 steps, so that smoothness is no agreement.
guided="--cfg 3"
judged="$guided --judge $here/judge.pt"
depth="evaluate.py depth --images 256"
image="evaluate.py image $guided"
follow="evaluate.py follow $judged"
joint="evaluate.py joint --steps 32 $judged --judge-steps 32"

# claims that need it, network, measurement, command
measurements="
3,4,5,9 plain    depth         $depth
4,5 plain-scratch depth        $depth
4   short        depth         $depth

1   plain-long   image         $image
1,2 plain-long   depth         $depth
1,2,8 plain-long follow-1      $follow
1,8 plain-long   follow-0      $follow --strength 0
1,6 plain-long   order-5       $joint --order 5

2   plain-long   steps-8       $depth --steps 8
2   plain-long   steps-32      $depth --steps 32
2   shared-long  depth         $depth
2   shared-long  steps-8       $depth --steps 8
2   shared-long  steps-32      $depth --steps 32
2   shared-long  follow-1      $follow
2   unheld-long  depth         $depth
2   unheld-long  steps-8       $depth --steps 8
2   unheld-long  steps-32      $depth --steps 32
2   unheld-long  follow-1      $follow

3,9 sparse-10    depth         $depth
3   sparse-2     depth         $depth
3   lidar        depth         $depth
3   sfm          depth         $depth
3   filled-10    depth         $depth
3   filled-2     depth         $depth

7   t2i          image         $image
7   rooms-taught image         $image
7   rooms-taught-10 image        $image
7   rooms-untaught image         $image
7   rooms-taught drift         drift.py --teacher @t2i/last.pt
7   rooms-taught-10 drift        drift.py --teacher @t2i/last.pt
7   rooms-untaught drift         drift.py --teacher @t2i/last.pt

8   plain-long   follow-0.7    $follow --strength 0.7
8   plain-long   follow-0.85   $follow --strength 0.85
8   plain-long   follow-0.95   $follow --strength 0.95
8   plain-long   follow-0.992  $follow --strength 0.992

9   detokenizer-0 depth        $depth
9   detokenizer-2 depth        $depth
9   logit-normal depth         $depth
9   velocity     depth         $depth
9   velocity     steps-32      $depth --steps 32
9   plain        steps-32      $depth --steps 32
9   modes-none   depth         $depth
9   modes-paper  depth         $depth
9   zeros        depth         $depth
9   unmixed      depth         $depth

6   plain-long   order-2       $joint --order 2
6   plain-long   order-0       $joint --order 0
6   plain-long   order--2      $joint --order -2
6   plain-long   order--5      $joint --order -5
6   plain-long   image-first   $joint --order rgb,depth
6   plain-long   depth-first   $joint --order depth,rgb
6   plain-long   indoors-image-first $joint --data @indoors --workers 0 --order rgb,depth
6   plain-long   indoors-0     $joint --data @indoors --workers 0 --order 0
6   plain-long   indoors-depth-first $joint --data @indoors --workers 0 --order depth,rgb

5   narrow       depth         $depth
5   narrow-scratch depth       $depth
5   wide         depth         $depth
5   wide-scratch depth         $depth
"

fail() {  # with one line, and exit code 2
    echo "claims.sh: $*" >&2
    exit 2
}

patch_of() { awk -v name="$1" '$1 == name { print $2; exit }' <<<"$networks"; }
command_of() { awk -v name="$1" '$1 == name { $1 = $2 = ""; print substr($0, 3); exit }' <<<"$networks"; }
needed_by() { grep -o '@[^ /]*' <<<"$1" | tr -d @ || true; }

recipe() {  # patch, command -> all that leads to what it makes, in a line
    local other
    for other in $(needed_by "$2"); do recipe "$(patch_of "$other")" "$(command_of "$other")"; done
    [ "$1" = - ] || echo -n "$1.patch $(grep '^+' "$here/$1.patch" | cksum | cut -d ' ' -f 1): "
    [[ $2 != *$here/judge.pt* ]] || echo -n "judge.pt $(cksum <$here/judge.pt | cut -d ' ' -f 1): "
    echo -n "$2; "
}

code() {  # patch -> a folder with the scripts as they are now, patched
    local patch=/dev/null folder
    [ "$1" = - ] || patch=$PWD/$here/$1.patch
    folder=$work/code/$1-$(cat ./*.py $here/drift.py "$patch" | cksum | cut -d ' ' -f 1)
    if [ ! -e "$folder" ]; then
        mkdir -p "$folder.$$" && cp ./*.py $here/drift.py "$folder.$$"
        if [ "$1" != - ]; then
            (cd "$folder.$$" && GIT_CEILING_DIRECTORIES=$work/code git apply "$patch") || return 1
        fi
        mv -T "$folder.$$" "$folder" 2>/dev/null || rm -r "$folder.$$"  # another process was first
    fi
    echo "$folder"
}

run() {  # patch, seed, folder for what it writes, command
    local folder other words i
    for other in $(needed_by "$4"); do train "$other" "$2"; done
    folder=$(code "$1") || fail "$here/$1.patch does not apply to the scripts; make it anew"
    read -ra words <<<"${4//SEED/$2}"
    for i in "${!words[@]}"; do
        if [[ ${words[i]} == @* ]]; then
            other=${words[i]#@}
            words[i]=$work/${other%%/*}.$2${other#"${other%%/*}"}
        fi
    done
    mkdir -p "$(dirname "$3")"  # the folder itself is for what the script writes
    echo "$(date +%T) seed $2, patch $1: $4" >&2
    "$python" "$folder/${words[0]}" "${words[@]:1}" --out "$3" >"$3.log" 2>&1 </dev/null &
    child=$!
    wait $child || { tail -n 3 "$3.log" >&2; fail "stopped; $3.log says why"; }
}

train() {  # network, seed
    local folder=$work/$1.$2 command steps
    command=$(command_of "$1")
    [ -n "$command" ] || fail "no network is called $1"
    [ "$(cat "$folder.recipe" 2>/dev/null)" = "$(recipe "$(patch_of "$1")" "$command")" ] || rm -rf "$folder"
    [ ! -e "$folder/done" ] || return 0
    [[ $command != data.py* ]] || rm -rf "$folder"  # begun and not ended; trainings go on
    mkdir -p "$work" && recipe "$(patch_of "$1")" "$command" >"$folder.recipe"
    run "$(patch_of "$1")" "$2" "$folder" "$command"
    steps=$(sed -n 's/.*--steps \([0-9]*\).*/\1/p' <<<"$command")  # a signal ends training early, with exit code 0
    [ -z "$steps" ] || [ -e "$folder/step-$(printf %07d "$steps").pt" ] || fail "$folder was stopped before step $steps"
    touch "$folder/done"
}

measure() {  # network, seed, measurement, command, recipe
    local out=$work/$1.$2/$3 result=$results/$1/$3.$2.json
    train "$1" "$2"
    run "$(patch_of "$1")" "$2" "$out" "$4 --checkpoint @$1/last.pt"
    mkdir -p "$results/$1"
    "$python" - "$out/results.json" "$5" >"$result.new" <<'END' && mv "$result.new" "$result"
import json, sys
settings = ("depth_scale", "depth_min", "depth_max", "measured", "strength", "order")  # the command has them
result = {"made by": sys.argv[2]}
for key, number in json.load(open(sys.argv[1])).items():
    if isinstance(number, float) and key not in settings:
        result[key] = round(number, 6)
print(json.dumps(result, indent=1))
END
}

list=
chosen=
child=
for word in "$@"; do
    case $word in
    --list) list=yes ;;
    [1-9]) chosen+=$word ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) fail "$word: give --list, or numbers of claims from 1 to 9" ;;
    esac
done
mkdir -p "$work"
for seed in $seeds; do
    [[ $seed =~ ^[0-9]+$ ]] || fail "SEEDS=$seeds: give numbers, with spaces between"
    exec {lock}>"$work/lock.$seed"
    [ -n "$list" ] || flock -n "$lock" || fail "another call is at work on seed $seed"
done
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; wait; exit 143' TERM INT
done=0
left=0
while read -r claims network name command; do
    [ -n "$claims" ] || continue
    [ -z "$chosen" ] || grep -q "[$chosen]" <<<"$claims" || continue
    made_by="$(recipe - "@$network $command")"
    made_by=${made_by/@$network /}
    for seed in $seeds; do
        if grep -qsF "\"$made_by\"" "$results/$network/$name.$seed.json"; then
            done=$((done + 1))
            [ -z "$list" ] || echo "done: claim $claims, seed $seed, $network: $command"
        elif [ -n "$list" ]; then
            left=$((left + 1))
            echo "left: claim $claims, seed $seed, $network: $command"
        else
            measure "$network" "$seed" "$name" "$command" "$made_by"
            done=$((done + 1))
        fi
    done
done <<<"$measurements"
echo "$done measurements done, $left left"
