"""One of the processes of tests/test_distributed.py: python -m torch.distributed.run ... tests/ranks.py KIND FOLDER

It trains the model of FOLDER for two steps on its part of each batch in FOLDER/case.pt, or answers as one of two tensor
parallel processes, or predicts with a Trainer. Rank 0 writes FOLDER/result.pt.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from llava_vr import LlavaVrCollator, LlavaVrForConditionalGeneration, LlavaVrProcessor


LIMIT = timedelta(seconds=60)  # of a collective: a rank that waits in vain is an error


def shard(model):
    """FSDP2 in accelerate's units: those of `_no_split_modules`, and the embeddings."""
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model.get_input_embeddings())
    return fully_shard(model)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(kind: str, folder: Path, inputs: dict, frozen: bool) -> dict:
    model = LlavaVrForConditionalGeneration.from_pretrained(folder).train()
    model.requires_grad_(True)
    if frozen:
        model.model.vision_tower.requires_grad_(False)
    if kind == "ddp":  # without a look for unused parameters, unless the tower's last layer is one
        wrapped = DistributedDataParallel(model, find_unused_parameters=not frozen)
    else:
        wrapped = shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for _ in range(2):
        loss = wrapped(**inputs).loss
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        grads = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        steps.append({"loss": total / dist.get_world_size(), "grads": grads})
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():  # evaluation, too, with ranks that hold no image
        total = wrapped(**inputs).loss
    dist.all_reduce(total)
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(folder / kind, state_dict=weights)
    return {"steps": steps, "evaluation": total / dist.get_world_size()}


def tensor_parallel(folder: Path, case: dict) -> dict:
    model = LlavaVrForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    inputs = case["inputs"]
    with torch.no_grad():
        logits = model(**inputs).logits
    return {
        "sharded": sharded,
        "logits": whole(logits),
        "answers": model.generate(**case["prompt"], max_new_tokens=8, do_sample=False),
    }


def predict(folder: Path, rows: list[dict]) -> dict:
    """What a Trainer predicts, and the number of logits and labels that its `compute_metrics` was given."""
    trainer = Trainer(
        LlavaVrForConditionalGeneration.from_pretrained(folder),
        TrainingArguments(str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=2),
        LlavaVrCollator(LlavaVrProcessor.from_pretrained(folder)),
        eval_dataset=rows,
        compute_metrics=lambda found: {"rows": len(found.predictions), "labels": int((found.label_ids != -100).sum())},
    )
    trainer.args.remove_unused_columns = False
    metrics = trainer.evaluate()
    found = trainer.predict(rows)
    return {
        "metrics": {name: metrics[f"eval_{name}"] for name in ("rows", "labels")},
        "logits": torch.tensor(found.predictions),
        "labels": torch.tensor(found.label_ids),
    }


def main(kind: str, folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=LIMIT)
    case = torch.load(folder / "case.pt")
    if kind == "tp":
        result = tensor_parallel(folder, case)
    elif kind == "predict":
        result = predict(folder, case["rows"])
    else:
        result = [train(kind, folder, ranks[dist.get_rank()], case["frozen"]) for ranks in case["batches"]]
    if dist.get_rank() == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(sys.argv[1], Path(sys.argv[2]))
