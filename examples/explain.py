"""Where, and by how much, is a feature map wrong? Train on digits, look at one layer's mistakes.

python examples/explain.py [--data mnist:PATH] [--layer 1] [--figure maps.png]
"""

import argparse

import torch
from torch.nn import functional as F

import frfx
from frfx import data, networks, plot

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--layer", type=int, default=1)
parser.add_argument("--figure", default="maps.png")
arguments = parser.parse_args()

torch.manual_seed(0)
train, test = data.load(arguments.data, split="train"), data.load(arguments.data, split="test")
model = networks.build(arguments.data.partition(":")[0])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for x, y in train.batches(64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
model.eval()
print(f"test accuracy {frfx.accuracy(model, test.batches(1000)):.3f}")

inverse = frfx.invert(model, arguments.layer, policy="minimal")
x, y = next(iter(test.batches(1000)))
wrong = model(x).argmax(1) != y
nodes = inverse.reconstruct(x[wrong], y[wrong])
feature = nodes[inverse.layer]

moved = feature.target - feature.forward
deviation = moved.reshape(*moved.shape[:2], -1).norm(dim=2)
print(f"{int(wrong.sum())} mistakes; what {inverse.layer!r} should change for them, by channel:")
for channel, share in enumerate((deviation**2).sum(0) / (deviation**2).sum()):
    print(f"  channel {channel:2d}  {float(share):6.1%}")

figure = plot.feature_maps(feature.forward[:5], feature.target[:5], images=x[wrong][:5])
figure.savefig(arguments.figure, dpi=150)
print(f"figure: {arguments.figure}")
