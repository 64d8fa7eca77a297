#!/usr/bin/env bash
# Captions: the projector, and the modules, learn to speak to a frozen decoder. The prompt is the image alone.
set -euo pipefail
. "${SETTINGS:-$(dirname "$0")/settings.sh}"
train "$WORK/stage1-data" "$RUN/stage1" --model "$RUN/converted" --stage "$STAGE1_PARTS" --prompt plain \
  --learning_rate 1e-3 --gradient_checkpointing true \
  --per_device_train_batch_size "$STAGE1_BATCH" --gradient_accumulation_steps "$STAGE1_ACCUMULATE"
