#!/usr/bin/env bash
# Everything that needs a GPU, with results as JSON: the tests marked gpu, parity of the tiny models in fp32 and bf16,
# and the full-size shapes.
# usage: scripts/validate_gpu.sh RESULTS_DIR [tests|parity|llama|mistral ...]   (default: all four)
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "$1" && cd "$1" && pwd); shift
[ $# -gt 0 ] || set -- tests parity llama mistral
work=${FLASHCORE_WORKDIR:-$(mktemp -d)}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
status=0
for part in "$@"; do
  case $part in
    tests) python3 -m pytest -m gpu tests/gpu -q -n "${FLASHCORE_JOBS:-4}" --dist loadgroup --durations 10 \
             --junitxml "$results/gpu-tests.xml" || status=1
           python3 scripts/junit_to_json.py "$results/gpu-tests.xml" "$results/gpu-tests.json" && rm -f "$results/gpu-tests.xml" ;;
    parity) # One training serves both.
            for dtype in float32 bfloat16; do
              python3 -m flashcore_hf parity --device cuda --dtype $dtype --workdir "$work/tiny" --json "$results/parity-$dtype.json" || status=1
            done ;;
    llama) python3 scripts/validate_models.py --name Llama-3.1-8B --workdir "$work" --json "$results/llama-3.1-8b.json" || status=1 ;;
    mistral) python3 scripts/validate_models.py --name Mistral-7B-v0.1 --workdir "$work" --json "$results/mistral-7b.json" || status=1 ;;
    *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
exit $status
