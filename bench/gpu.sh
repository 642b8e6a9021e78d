#!/usr/bin/env bash
# GPU tests and benchmarks in at most eight minutes, each part with a time limit of its own.
#
#   bench/gpu.sh               # on a machine with an NVIDIA GPU; JSON in bench/results/gpu_*.json
#   bench/gpu.sh --out DIR     # JSON there
#   bench/gpu.sh --dry         # tries everything out on a CPU with tiny sizes
#
# Needs PyTorch 2.11 or newer and skylar's own requirements without jsonargparse, nothing from a
# package index. PYTHON names the interpreter (default python3).
set -uo pipefail
cd "$(dirname "$0")/.."
dry='' out=bench/results
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=--dry; [ "$out" = bench/results ] && out=$(mktemp -d) ;;
        --out) out=$2; shift ;;
        *) sed -n '2,6s/^# \?//p' "$0"; exit 2 ;;
    esac
    shift
done
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
deadline=$((SECONDS + 470)) failed=0 lines=()

part() {  # name, seconds, script
    local left=$((deadline - SECONDS)) limit=$2 start=$SECONDS code
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        code=skipped
    else
        echo "== $1 (at most $limit s)"
        timeout -k 5 "$limit" "${PYTHON:-python3}" "bench/$3" $dry --out "$out"
        code=$?
    fi
    [ "$code" = 0 ] || failed=1
    lines+=("{\"part\": \"$1\", \"exit\": \"$code\", \"seconds\": $((SECONDS - start))}")
    (IFS=,; echo "[${lines[*]}]") > "$out/gpu_parts.json"
}

part tests     90  tests_gpu.py
part attention 50  attention_gpu.py
part loss      30  loss_gpu.py
part training  130 train_gpu.py
part decoding  50  decode_gpu.py
part sparse    70  moe_gpu.py
part latent    50  latent_gpu.py
cat "$out/gpu_parts.json"
echo "JSON in $out"
exit $failed
