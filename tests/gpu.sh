#!/usr/bin/env bash
# Everything to measure on a GPU, in the order of value.
#
#   tests/gpu.sh                      all parts; at most 25 minutes: those that no longer fit are skipped
#   MINUTES=9 tests/gpu.sh speed graphs kernels      these parts, in 9 minutes
#   tests/gpu.sh --toy                all parts at toy size, to test the script itself; the default without a GPU
#
# Parts: stages speed graphs kernels suite sampling evaluation rendering ranks training (python tests/gpu.py --help).
# Each runs in its own process with its own time limit; the last one, training, gets what is left. Rows of results are
# added to gpu.md as soon as they are known. The exit code is 1 if a part failed.
#
# MINUTES  time for all parts together, whole minutes (25)
# OUT      folder for gpu.md, gpu.log, grid.png and the last metrics (runs/gpu)
# PYTHON   interpreter (.venv/bin/python if it is there, or else python)

set -uo pipefail

GPU_PARTS="
300 stages --preset tiny --batch-size 32
150 speed --preset 370m --batch-size 16
120 speed --preset 370m --batch-size 16 --eager
180 speed --preset 800m --batch-size 16
270 speed --preset 3b --batch-size 16 --checkpoint-activations
270 speed --preset klein-4B --batch-size 4 --checkpoint-activations --no-ema
120 graphs --preset tiny
120 kernels --preset 370m --batch-size 4
120 suite
120 sampling --preset 370m --batch-size 16
150 sampling --preset 370m --batch-size 4 --size 1024
60 sampling --preset nano --batch-size 64
90 evaluation
60 rendering --batch-size 128 --size 256
240 ranks --preset tiny --batch-size 64
9999 training --preset tiny --batch-size 64"

TOY_PARTS="
300 stages --batch-size 4 --size 16 --steps 5
300 speed --batch-size 2 --size 16 --turns 1 --checkpoint-activations
300 graphs --batch-size 2 --size 16
300 kernels --batch-size 2 --size 16 --eager
300 suite
300 sampling --batch-size 2 --size 16 --steps 2
300 evaluation
300 rendering --batch-size 8 --size 32
300 ranks --batch-size 4 --size 16 --steps 5
300 training --batch-size 4 --size 16"

main() {
    toy=
    wanted=" "
    for word in "$@"; do
        case $word in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --toy) toy=--toy ;;
        *)
            awk '{ print $2 }' <<<"$GPU_PARTS" | grep -qx -- "$word" || give_up "$word: no part; see tests/gpu.sh --help"
            wanted+="$word "
            ;;
        esac
    done
    cd "$(dirname "$0")/.." || exit 2
    MINUTES=${MINUTES:-25}
    [[ $MINUTES =~ ^[0-9]+$ ]] || give_up "MINUTES=$MINUTES: give whole minutes, such as 25"
    OUT=${OUT:-runs/gpu}
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
    fi
    where=$("$PYTHON" tests/gpu.py where) || exit 2
    [[ $where == *" cpu |"* ]] && toy=--toy
    parts=$GPU_PARTS
    [[ $toy ]] && parts=$TOY_PARTS

    mkdir -p "$OUT" || exit 2
    trap 'rm -rf "$OUT/work"' EXIT
    running=
    trap 'kill $running 2>/dev/null; wait; exit 130' INT TERM
    failed=0
    printf '\n%s\n| --- | --- | --- | --- | --- | --- |\n' "| part | what | result | device | torch | commit |" | tee -a "$OUT/gpu.md"
    while read -r limit part flags; do
        [[ $part ]] && [[ $wanted == " " || $wanted == *" $part "* ]] && run_part
    done <<<"$parts"
    exit $failed
}

run_part() {
    left=$((MINUTES * 60 - SECONDS))
    limit=$((limit < left ? limit : left))
    if ((limit < 20)); then
        add_row "skipped: no time left"
        return
    fi
    [[ $part == training && ! $toy ]] && flags+=" --seconds $limit"
    echo "== $part $flags" >>"$OUT/gpu.log"
    # shellcheck disable=SC2086  # flags are words
    timeout --kill-after 40 $limit "$PYTHON" tests/gpu.py $part $flags $toy --out "$OUT" </dev/null 2>>"$OUT/gpu.log" &
    running=$!
    wait $running
    code=$?
    running=
    rm -rf "$OUT/work"
    if ((code)); then
        failed=1
        ((code == 124 || code == 137)) && reason="over its limit of $limit s" || reason="exit code $code"
        add_row "FAIL: $reason; last lines in gpu.log"
        tr '\r' '\n' <"$OUT/gpu.log" | tail -n 20
    fi
}

give_up() {
    echo "$1" >&2
    exit 2
}

add_row() { echo "| $part | ${flags:-as it is} | $1 | $where |" | tee -a "$OUT/gpu.md"; }

main "$@"
