#!/usr/bin/env bash
# Joins the language model and the vision tower; projector and modules are new.
set -euo pipefail
. "${SETTINGS:-$(dirname "$0")/settings.sh}"
layers=$([ "$MODULES" = on ] && echo "$REMEMBER_LAYERS" || true)
python convert_weights.py "$LANGUAGE_MODEL" "$RUN/converted" --vision-tower "$VISION_TOWER" $CONVERT_OPTIONS \
  --remember-layers $layers --overwrite
