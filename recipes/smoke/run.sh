#!/usr/bin/env bash
# The recipe's scripts from beginning to end on tiny parts and 200 drawn pictures, in a few minutes on two cores.
#   recipes/smoke/run.sh                MODULES=off trains without Vision Remember modules, WORK=DIR writes elsewhere
# Where lmms-eval is not installed, a stand-in for it (tests/stubs) asks the questions.
set -euo pipefail
cd "$(dirname "$0")/../.."
export SETTINGS=recipes/smoke/settings.sh WORK=${WORK:-work/smoke} OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1
rm -rf "$WORK"
python -m recipes.smoke.make_parts "$WORK"
for script in convert prepare stage1 stage2 evaluate; do
  recipes/llava_vr_2b/$script.sh
done
