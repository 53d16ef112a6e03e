"""One step of post-training: freeze the rest, compute the loss, give back what was frozen."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import networkx as nx
from torch import Tensor, fx, nn
from torch.nn import functional as F

from frfx.compiler.emit import forward_module
from frfx.compiler.tail import Network
from frfx.compiler.trace import trace
from frfx.compiler.view import check_model, evaluation_view
from frfx.errors import LayerError, TargetError
from frfx.policy import Policy
from frfx.posttrain.loss import Losses, combine
from frfx.posttrain.targets import Targets


class PostTraining(nn.Module):
    """Trains the layers `l_S + 1 .. l_R` of a network against reconstructed features (Eq. 1-3).

    Creating one freezes everything else: `requires_grad` is switched off for all other parameters
    until `restore`, or the end of a `with` block. A call computes the loss of a batch. The trained
    layers follow the mode of this module (`train()`, `eval()`), the frozen ones are in evaluation
    mode throughout; the modes of the model itself are not touched.

    Args:
        model: The network. Its trained parameters are the ones that an optimizer changes.
        upto_layer: `l_R`, the last trained layer; an int or a node's name, as for `frfx.invert`.
        freeze_upto: `l_S`, the last layer of the frozen front; 0 trains from the input on.
        alpha: The weight of the reconstruction loss in Eq. 3, in [0, 1]. With 0 this is plain
            post-training of the module by backpropagation, and nothing is reconstructed. With 1
            nothing is backpropagated through the frozen tail, and the tail is run for the targets
            alone.
        policy: How features are reconstructed, as for `frfx.invert`.
        backend: As for `frfx.invert`.
        example_input: A batch; needed only for models that symbolic tracing cannot follow.
        classification_loss: Takes logits and labels (Eq. 1).
        reconstruction_loss: Takes the forward and the reconstructed feature (Eq. 2).

    Raises:
        LayerError: If the layers do not exist, are not in order, hold no parameter to train, or
            share one with the frozen rest.
        UnsupportedOpsError: If the frozen tail cannot be inverted.

    Example:
        >>> with frfx.PostTraining(model, upto_layer=3, freeze_upto=1, alpha=0.1) as step:
        ...     optimizer = torch.optim.Adam(step.trained_parameters())
        ...     for x, y in loader:
        ...         optimizer.zero_grad()
        ...         step(x, y).total.backward()
        ...         optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        upto_layer: int | str,
        freeze_upto: int | str = 0,
        alpha: float = 0.1,
        policy: Policy | str = "paper",
        backend: str = "auto",
        example_input: Tensor | None = None,
        classification_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        reconstruction_loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    ) -> None:
        super().__init__()
        check_model(model)
        if not 0 <= alpha <= 1:
            raise TargetError(f"alpha weighs two losses (Eq. 3): it lies in [0, 1], not at {alpha}")
        self.alpha = alpha
        self.classification_loss = classification_loss
        self.reconstruction_loss = reconstruction_loss
        traced = trace(evaluation_view(model), example_input)
        network = Network(traced)
        start, end = network.find(freeze_upto), network.find(upto_layer)
        trained_nodes = _between(network, start, end)
        self._trained = _trained_parameters(network, trained_nodes, start, end)
        self._modules_trained = [
            module
            for node in trained_nodes
            if node.op == "call_module"
            for module in traced.root.get_submodule(str(node.target)).modules()
        ]
        logits = network.logits()
        self.to_feature = forward_module(traced, (end,))
        self.to_output = forward_module(traced, (end, logits))
        self.targets = None
        if alpha > 0:
            buffers = [buffer for module in self._modules_trained for buffer in module.buffers()]
            self.targets = Targets(
                model,
                [*self._trained, *buffers],
                upto_layer=upto_layer,
                policy=policy,
                backend=backend,
                example_input=example_input,
            )
        trained = {id(parameter) for parameter in self._trained}
        self._frozen = [
            parameter
            for parameter in model.parameters()
            if id(parameter) not in trained and parameter.requires_grad
        ]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor, y: Tensor, target: Tensor | None = None) -> Losses:
        """Return the losses of a batch.

        Args:
            x: The input batch.
            y: Integer labels (N,), or what the losses and the policy take as an output target.
            target: The reconstructed feature `a*` of this batch, if it is known already.

        Returns:
            The total loss and its parts.
        """
        if self.alpha == 1:
            (feature,) = self.to_feature(x)
            output = classification = None
        else:
            feature, output = self.to_output(x)
            classification = self.classification_loss(output, y)
        reconstruction = None
        if self.targets is not None:
            if target is None:
                target = self.targets(x, y)
            reconstruction = self.reconstruction_loss(feature, target)
        total = combine(self.alpha, classification, reconstruction)
        return Losses(total, classification, reconstruction, output)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the trained layers, in forward order."""
        return list(self._trained)

    def restore(self) -> None:
        """Give every frozen parameter its gradient back; the trained weights stay as they are."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def train(self, mode: bool = True) -> PostTraining:
        """Set the mode of the trained layers; the frozen ones stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for module in self._modules_trained:
            module.training = mode
        return self

    def __enter__(self) -> PostTraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


def _between(network: Network, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes that the trained layers consist of."""
    paths = network.traced.paths
    if start is end or not nx.has_path(network.flow, start, end):
        raise LayerError(
            f"nothing to train between {paths[start]!r} (freeze_upto) and {paths[end]!r} "
            "(upto_layer): the first must lie before the second"
        )
    front = nx.ancestors(network.flow, start) | {start}
    within = (nx.ancestors(network.flow, end) | {end}) - front
    return [node for node in network.traced.graph.nodes if node in within]


def _trained_parameters(
    network: Network, trained_nodes: list[fx.Node], start: fx.Node, end: fx.Node
) -> list[nn.Parameter]:
    paths = network.traced.paths
    trained = network.parameters(set(trained_nodes))
    others = {id(p) for p in network.parameters(set(network.flow) - set(trained_nodes))}
    shared = [parameter for parameter in trained if id(parameter) in others]
    if shared:
        names = [n for n, p in network.traced.root.named_parameters() if id(p) in map(id, shared)]
        raise LayerError(
            f"{', '.join(names)} is used by the trained and by the frozen layers: it cannot be "
            "trained and frozen at once"
        )
    trained = [parameter for parameter in trained if parameter.requires_grad]
    if not trained:
        raise LayerError(
            f"no parameter to train between {paths[start]!r} and {paths[end]!r}: the layers have "
            "none, or requires_grad is off for all of them"
        )
    return trained
