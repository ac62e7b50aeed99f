#!/usr/bin/env bash
# All that one GPU has to say of a revision, in at most seven minutes: the 8-bit Hopper kernel and its variants, each in a
# process of its own (50 s, side by side), the tier gpu (170), the ops that rollouts are made of (60), whole rollouts in
# turn with another revision's (140). Every step has its limit, and what it printed so far is kept.
#
#   bash bench/gpu_check.sh BEFORE OUT      BEFORE: a folder with the other revision, OUT: where logs and results go
#
# PYTHON chooses the interpreter (torch, triton, pytest, pytest-benchmark; with pytest-xdist the tests share the GPU).
set -uo pipefail
if [ $# != 2 ] || [ ! -d "$1/hiar_model" ]; then
    echo "gpu_check.sh: give BEFORE, a folder with another revision of the project, and OUT" >&2
    exit 2
fi
before=$(realpath "$1") out=$(mkdir -p "$2" && realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/tests
status=0

step() { # name, seconds, command
    local name=$1 limit=$2 begun=$SECONDS code
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    code=$?
    [ $code = 0 ] || status=1
    echo "== $name: exit status $code, $((SECONDS - begun)) of $limit s"
    grep -E '^(\||FAILED|ERROR|E  |=+ .* in [0-9])' "$out/$name.log" | cut -c1-200 | tail -40
}

# A kernel that nobody has run may hang: what does not pass here is neither tested further nor measured.
names=(pinned "3 stages" "wide tails" polynomial "polynomial 3 stages") pids=() left_out=()
fp8=tests/gpu/test_attention_fp8_gluon.py
for i in "${!names[@]}"; do
    timeout 50 "$python" -m pytest -p no:cacheprovider -q -m gpu \
        "$fp8::test_variants_and_the_logsumexp[half empty-${names[i]}]" \
        "$fp8::test_variants_and_the_logsumexp[two tasks in a row-${names[i]}]" > "$out/variant-$i.log" 2>&1 &
    pids+=($!)
done
for i in "${!names[@]}"; do
    wait "${pids[i]}"
    code=$?
    echo "== attention_fp8 gluon, ${names[i]}: exit status $code"
    grep -E '^(FAILED|ERROR|E  |=+ .* in [0-9])' "$out/variant-$i.log" | cut -c1-200 | tail -8
    [ $code != 0 ] || continue
    status=1
    variant=gluon_${names[i]// /_}
    [ "${names[i]}" = pinned ] && variant=gluon && left_out+=(--deselect "$fp8")
    for case in "half empty" "two tasks in a row"; do
        left_out+=(--deselect "$fp8::test_variants_and_the_logsumexp[$case-${names[i]}]")
    done
    for shape in task pair; do
        left_out+=(--deselect "bench/ops/bench_ops.py::test_op[attention_fp8-$shape-forward-$variant]")
    done
done

together=()
"$python" -c 'import xdist' 2> /dev/null && together=(-n 14)
step tests 170 "$python" -m pytest -p no:cacheprovider -q "${together[@]}" "${left_out[@]}" -m gpu tests/gpu \
    tests/interpreter
step ops 60 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -q -p bench.lib.resume --resume "$out/ops.jsonl" --budget 50 \
    -p pytest_benchmark.plugin bench/ops/bench_ops.py --benchmark-only --results "$out/ops" "${left_out[@]}" \
    -k '(attention-visit or attention-pair or attention_fp8 or linear or pointwise) and not flex and not flash and not efficient and not compiled and not GELU and not eager'
step rollouts 140 "$python" -m bench.rollout.ab --a-dir "$before" --b-dir . --order stream --order block_first \
    --order wavefront+fused --order stream+shared_keys --rounds 4 --budget 110 --results "$out/ab"
exit $status
