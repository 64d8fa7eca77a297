#!/usr/bin/env bash
# Checks the data of both stages and writes them with the rows' lengths, once for both kinds of model.
set -euo pipefail
. "${SETTINGS:-$(dirname "$0")/settings.sh}"

prepare() {  # DATA IMAGES OUT [OPTION ...]
  local data=$1 images=$2 out=$3
  shift 3
  [ -f "$out/rows.arrow" ] || python examples/finetune.py "$data" ${images:+--image-folder "$images"} --prepare "$out" \
    --model "$RUN/converted" --processes "$PROCESSES" --on-error skip "$@"
}

prepare "$STAGE1_DATA" "$STAGE1_IMAGES" "$WORK/stage1-data" --prompt plain
prepare "$STAGE2_DATA" "$STAGE2_IMAGES" "$WORK/stage2-data"
