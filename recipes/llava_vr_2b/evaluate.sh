#!/usr/bin/env bash
# The benchmarks at each s of $DOWNSAMPLES, and the table of them. A model other than that of stage 2 is the argument.
set -euo pipefail
. "${SETTINGS:-$(dirname "$0")/settings.sh}"
model=${1:-$RUN/stage2}
for s in $DOWNSAMPLES; do
  $HARNESS --model llava_vr --model_args "pretrained=$model,projector_downsample=$s,$MODEL_ARGS" --tasks "$TASKS" \
    --include_path evaluation/tasks/lmms_eval --batch_size "$EVAL_BATCH" --output_path "$RUN/results/s$s"
done
python -m evaluation.table $(printf "$RUN/results/s%s " $DOWNSAMPLES)
