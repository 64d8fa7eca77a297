"""Asks a model the messages of a JSON file and prints its answers, where VLMEvalKit takes the names of benchmarks."""

import argparse
import json

from vlmeval.config import supported_VLM


parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--model", required=True)
args = parser.parse_args()
model = supported_VLM[args.model]()
with open(args.data, encoding="utf-8") as file:
    print(json.dumps([model.generate(message, dataset="LAB") for message in json.load(file)]))
