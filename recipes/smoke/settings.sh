# The recipe's settings for tiny parts and drawn pictures, on two processes of a CPU.
WORK=${WORK:-work/smoke}
LANGUAGE_MODEL=$WORK/parts/decoder
VISION_TOWER=$WORK/parts/tower
REMEMBER_LAYERS="0 1"
CONVERT_OPTIONS="--projector avg_pool --set projector_downsample=2 --set projector_downsample_choices=[1,2,4]
  --set remember_hidden_size=32 --set remember_num_heads=4 --remember-feature-layers 1 2 3"
STAGE1_DATA=$WORK/data/stage1.json
STAGE1_IMAGES=$WORK/data
STAGE2_DATA=$WORK/data/stage2.json
HOLD_OUT=8
PROCESSES=2
GPUS=2
LAUNCH="python -m torch.distributed.run --standalone --nproc_per_node 2"
STAGE1_BATCH=8
STAGE1_ACCUMULATE=1
STAGE2_BATCH=8
STAGE2_ACCUMULATE=1
OPTIONS="--use_cpu true --logging_steps 1 --eval_strategy steps --eval_steps 6 --save_steps 6"
HARNESS="python -m lmms_eval"
TASKS=llava_vr_lab
MODEL_ARGS=dtype=float32
DOWNSAMPLES="1 2 4"
. recipes/llava_vr_2b/settings.sh
python -c "import lmms_eval" 2> /dev/null || export PYTHONPATH=tests/stubs${PYTHONPATH:+:$PYTHONPATH}
