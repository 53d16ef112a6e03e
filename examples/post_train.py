"""Post-train one module of a network that stays frozen otherwise, in a training loop of your own.

python examples/post_train.py [--data mnist:PATH] [--freeze-upto 1] [--upto 2] [--alpha 0.1]
"""

import argparse

import torch
from torch.nn import functional as F

import frfx
from frfx import data, networks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--freeze-upto", type=int, default=1)
parser.add_argument("--upto", type=int, default=2)
parser.add_argument("--alpha", type=float, default=0.1)
arguments = parser.parse_args()

torch.manual_seed(0)
train, test = data.load(arguments.data, split="train"), data.load(arguments.data, split="test")
loader, held_out = train.batches(64, shuffle=True), test.batches(1000)
model = networks.build(arguments.data.partition(":")[0])


def fit(parameters, loss_of, epochs):
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()


fit(model.parameters(), lambda x, y: F.cross_entropy(model(x), y), epochs=15)
print(f"before: test accuracy {frfx.accuracy(model, held_out):.4f}")

# The rest is frozen inside the block, and given back at its end, whatever happens in it.
with frfx.PostTraining(
    model, freeze_upto=arguments.freeze_upto, upto_layer=arguments.upto, alpha=arguments.alpha
) as step:
    fit(step.trained_parameters(), lambda x, y: step(x, y).total, epochs=3)
print(f"after:  test accuracy {frfx.accuracy(model, held_out):.4f}")
