"""Asks the questions of tasks, in one process or several, and writes a result file as lmms-eval does."""

import argparse
import importlib
import json
import runpy
from collections import defaultdict
from importlib.metadata import entry_points
from pathlib import Path

import datasets
import torch.distributed as dist
import yaml

from lmms_eval.api.instance import Instance


def load_task(folder: Path, name: str) -> dict:
    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        module, attribute = loader.construct_scalar(node).split(".")
        return runpy.run_path(str(folder / f"{module}.py"))[attribute]

    Loader.add_constructor("!function", function)
    return yaml.load((folder / f"{name}.yaml").read_text(), Loader)


def load_model(name: str, arguments: str, **options):
    (entry,) = (entry for entry in entry_points(group="lmms_eval.models") if entry.name == name)
    module, attribute = entry.load()().chat_class_path.rsplit(".", 1)
    values = dict(pair.split("=") for pair in arguments.split(","))
    values = {key: int(value) if value.isdigit() else value for key, value in values.items()}
    model = getattr(importlib.import_module(module), attribute)(**values, **options)
    assert not model.is_simple
    return model


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "model_args", "tasks", "batch_size", "output_path"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--include_path", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--gen_kwargs", default="")
    args = parser.parse_args()
    model = load_model(args.model, args.model_args, batch_size=args.batch_size, device=args.device)
    overrides = dict(pair.split("=") for pair in args.gen_kwargs.split(",") if pair)
    results, samples = {}, {}
    for name in args.tasks.split(","):
        task = load_task(args.include_path, name)
        split = task["test_split"]
        dataset = datasets.load_dataset(task["dataset_path"], split=split, **task["dataset_kwargs"])
        model.task_dict[name] = {split: dataset}
        generation = task["generation_kwargs"] | {key: json.loads(value) for key, value in overrides.items()}

        def to_messages(doc, task=task):
            images = [{"type": "image", "url": image} for image in task["doc_to_visual"](doc)]
            return [{"role": "user", "content": [*images, {"type": "text", "text": doc[task["doc_to_text"]]}]}]

        mine = range(len(dataset))[model.rank :: model.world_size]
        answers = model.generate_until([Instance(("", to_messages, dict(generation), i, name, split)) for i in mine])
        found = [(i, answer) for i, answer in zip(mine, answers, strict=True)]
        if model.world_size > 1:
            parts = [None] * model.world_size
            dist.all_gather_object(parts, found)
            found = [pair for part in parts for pair in part]
        samples[name] = [answer for _, answer in sorted(found)]
        scores = defaultdict(list)
        for doc, answer in zip(dataset, samples[name], strict=True):
            for metric, value in task["process_results"](doc, [answer]).items():
                scores[metric].append(value)
        results[name] = {f"{metric},none": sum(values) / len(values) for metric, values in scores.items()}
    if model.rank == 0:
        folder = Path(args.output_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stub_results.json").write_text(json.dumps({"results": results}, indent=1))
        (folder / "stub_samples.json").write_text(json.dumps(samples, indent=1))
        print(json.dumps(results))


main()
