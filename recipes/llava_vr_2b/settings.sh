# What the scripts of this recipe read. Each value can be set beforehand:  MODULES=off GPUS=16 recipes/llava_vr_2b/stage1.sh
: "${WORK:=work/llava_vr_2b}"    # everything is written below it
: "${MODULES:=on}"               # on: with Vision Remember modules; off: without
: "${LANGUAGE_MODEL:=Qwen/Qwen2-1.5B}"
: "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${REMEMBER_LAYERS:=0 7 14 21}"
: "${CONVERT_OPTIONS:=--projector avg_pool --set projector_downsample=2}"

: "${STAGE1_DATA:=data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${STAGE1_IMAGES:=data/LLaVA-Pretrain}"
: "${STAGE2_DATA:=data/LLaVA-NeXT-Data}"
: "${STAGE2_IMAGES:=}"           # empty: the images are inside the data, or beside them
: "${HOLD_OUT:=512}"             # rows on which a loss is taken during training
: "${PROCESSES:=$(nproc)}"       # that prepare the data

: "${GPUS:=8}"                   # of all machines
: "${LAUNCH:=accelerate launch --config_file recipes/llava_vr_2b/accelerate/fsdp2_8.yaml}"
: "${STAGE1_BATCH:=16}"          # rows a GPU at once; the total is 256
: "${STAGE1_ACCUMULATE:=$((256 / GPUS / STAGE1_BATCH))}"
: "${STAGE2_BATCH:=4}"           # the total is 128
: "${STAGE2_ACCUMULATE:=$((128 / GPUS / STAGE2_BATCH))}"
: "${OPTIONS:=--bf16 true --dataloader_num_workers 8 --eval_strategy steps --eval_steps 500 --save_steps 500}"

: "${HARNESS:=accelerate launch --num_processes $GPUS -m lmms_eval}"
: "${TASKS:=textvqa_val,docvqa_val,chartqa,ocrbench,infovqa_val,ai2d,gqa,pope,mme,mmmu_val,scienceqa_img}"
: "${MODEL_ARGS:=dtype=bfloat16}"
: "${DOWNSAMPLES:=2}"            # s at evaluation, of the model's choices: "1 2 4" for one that was trained with them
: "${EVAL_BATCH:=16}"

[ $((STAGE1_ACCUMULATE * STAGE2_ACCUMULATE)) -gt 0 ] || {
  echo "STAGE1_BATCH=$STAGE1_BATCH or STAGE2_BATCH=$STAGE2_BATCH rows on each of $GPUS GPUs are more than the total" >&2
  exit 1
}
RUN=$WORK/$([ "$MODULES" = on ] && echo modules || echo plain)
STAGE1_PARTS=$([ "$MODULES" = on ] && echo projector+remember || echo projector)
MODULE_RATES=$([ "$MODULES" = on ] && echo vision_remember=1e-4 || true)

# train DATA OUT OPTION ...: goes on from the last checkpoint if there is one
train() {
  local data=$1 out=$2
  shift 2
  $LAUNCH examples/finetune.py "$data" --output "$out" --on-error skip --too-long drop --hold-out "$HOLD_OUT" \
    --num_train_epochs 1 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
    $(compgen -G "$out/checkpoint-*" > /dev/null && echo --resume) "$@" $OPTIONS
}
