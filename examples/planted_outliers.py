"""The same model with outlier channels planted: norm weights times e^(spread z), z normal, the columns that read them divided by it.

Its function, and so its perplexity, is the model's own. Methods that see the norm's output channel by channel see outliers; those that fold
the norm into the weights first (ROSAQ, QuaRot, SpinQuant) see no difference. Compare them with `rosaq compare OUT`; docs/log.md has the figures.

Usage: python examples/planted_outliers.py MODEL OUT [--spread 1] [--seed 0]
"""

import argparse
import dataclasses

import torch

import rosaq
from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES
from rosaq.skeleton import full_model


def planted(source, spread, seed=0):
    """The source with such channels, the same ones in front of every layer."""
    generator, tensors = torch.Generator().manual_seed(seed), dict(source.tensors)
    scale = torch.exp(spread * torch.randn(source.architecture.hidden, generator=generator))
    for index in range(source.architecture.layers):
        prefix = source.architecture.block_prefix(index)
        for site, norm in SITE_NORM.items():
            tensors[f"{prefix}{NORMS[norm]}.weight"] = tensors[f"{prefix}{NORMS[norm]}.weight"].float() * scale
            for role in SITES[site]:
                tensors[f"{prefix}{LINEARS[role]}.weight"] = tensors[f"{prefix}{LINEARS[role]}.weight"].float() / scale
    return dataclasses.replace(source, tensors=tensors)


def main():
    """Save it as a Hugging Face folder, in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the logarithms of the factors")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = rosaq.open_source(arguments.model)
    full_model(planted(source, arguments.spread, arguments.seed), torch.float32).save_pretrained(arguments.output)
    source.tokenizer.save_pretrained(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
