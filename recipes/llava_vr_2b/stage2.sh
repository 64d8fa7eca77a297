#!/usr/bin/env bash
# Instructions: everything is trained, the tower slowly and the modules fast.
set -euo pipefail
. "${SETTINGS:-$(dirname "$0")/settings.sh}"
train "$WORK/stage2-data" "$RUN/stage2" --model "$RUN/stage1" --stage full \
  --learning_rate 1e-5 --learning-rates vision_tower=2e-6 $MODULE_RATES --train_sampling_strategy group_by_length \
  --gradient_checkpointing true \
  --per_device_train_batch_size "$STAGE2_BATCH" --gradient_accumulation_steps "$STAGE2_ACCUMULATE"
