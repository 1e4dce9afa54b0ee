"""What the programs that load adapters make of one: right, wrong scale, or refused, and why.

Each rule is read off a program's own loader, or seen running (`make consumers`); none of them is
run here. A wrong scale is the dangerous one: the adapter loads without a word, and does something
else. A part that is not loaded has the scale 0.
"""

from collections.abc import Mapping

from loramerge.consumers._languages import (
    llama_cpp,
    ollama,
    peft,
    peft_hotswap,
    sglang,
    transformers,
    vllm,
)
from loramerge.consumers._mlx import mlx
from loramerge.consumers._pipelines import diffusers
from loramerge.consumers._verdict import Rule, Verdict

__all__ = ["CONSUMERS", "DEFAULT_MAX_RANK", "Verdict"]

# The largest rank a server of vLLM takes unless it is started with another --max-lora-rank.
DEFAULT_MAX_RANK = 16
# A program by the name it is asked for.
CONSUMERS: Mapping[str, Rule] = {
    "peft": peft,
    "peft-hotswap": peft_hotswap,
    "transformers": transformers,
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "mlx": mlx,
    "diffusers": diffusers,
}
