"""The peer of `speed.py`: the same merge by PEFT, on a base model of empty layers.

python benchmarks/peft_peer.py linear out a0 a1 ...

PEFT needs an instantiated base model; here it is a tree of Linear layers of the right names and
shapes whose weights take no memory, the least it can be given. Weights are 1/N; how long a merge
takes does not depend on them. Prints the seconds of the merge alone as JSON.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

RANK = 16


def base_model(adapter: Path) -> nn.Module:
    """A Linear layer for every pair of an adapter; its weight is one zero seen m * n times."""
    zero = torch.zeros((), dtype=torch.bfloat16)
    root = nn.Module()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            stem, found, _ = key.partition(".lora_A.weight")
            if not found:
                continue
            into = file.get_slice(key).get_shape()[1]
            out = file.get_slice(f"{stem}.lora_B.weight").get_shape()[0]
            *parents, leaf = stem.removeprefix("base_model.model.").split(".")
            place = root
            for name in parents:
                if not hasattr(place, name):
                    place.add_module(name, nn.Module())
                place = getattr(place, name)
            linear = nn.Linear(into, out, bias=False, device="meta")
            linear.weight = nn.Parameter(zero.expand(out, into), requires_grad=False)
            place.add_module(leaf, linear)
    return root


def main() -> None:
    combination, out, *paths = sys.argv[1:]
    warnings.simplefilter("ignore")
    model = PeftModel.from_pretrained(
        base_model(Path(paths[0])), paths[0], adapter_name="a0", low_cpu_mem_usage=True
    )
    for at, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=f"a{at}", low_cpu_mem_usage=True)
    began = time.perf_counter()
    names = [f"a{at}" for at in range(len(paths))]
    options = {"svd_rank": RANK} if combination == "svd" else {}
    model.add_weighted_adapter(
        names, [1 / len(paths)] * len(paths), "merged", combination_type=combination, **options
    )
    seconds = time.perf_counter() - began
    model.save_pretrained(out, selected_adapters=["merged"])
    sys.stdout.write(json.dumps({"merge_seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
