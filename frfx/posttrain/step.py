"""One step of post-training: freeze the rest, compute the loss, give back what was frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from frfx import vocabulary
from frfx.compiler.bind import op_type
from frfx.compiler.forward import forward_module
from frfx.compiler.probe import run_forward
from frfx.compiler.tail import Network
from frfx.compiler.trace import Traced, is_output, trace
from frfx.errors import LayerError, ModeWarning, TargetError, TraceMismatchError
from frfx.policy import Policy
from frfx.posttrain.loss import Losses, Scale, combine
from frfx.posttrain.targets import Targets, named_tensors
from frfx.view import check_model, evaluation_view


class PostTraining(nn.Module):
    """Trains the layers `l_S + 1 .. l_R` of a network against reconstructed features (Eq. 1-3).

    Creating one freezes everything else: `requires_grad` is switched off for all other parameters
    until `restore`, or the end of a `with` block, which may be entered again. A call computes the
    loss of a batch. The modules of the trained layers follow the mode of this module (`train()`,
    `eval()`), the frozen ones are in evaluation mode throughout; the modes of the model itself are
    not touched. What the tracer has looked into does what it does in evaluation mode: functions to
    which the model's forward passes `self.training` (`F.dropout`, `F.batch_norm`), modules of your
    own that ask for it, parametrizations (the power iteration of spectral norm), and, where
    `torch.export` traces, all modules.

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
        output: Which of several tensors that the model returns is its output, as for
            `frfx.invert`.
        classification_loss: Takes logits and labels (Eq. 1).
        reconstruction_loss: Takes the forward and the reconstructed feature (Eq. 2).
        weighing: ``"paper"`` takes the terms of Eq. 3 as they are: alpha then weighs little for
            targets that lie close to the features, as those of `policy="joint"` do.
            ``"relative"`` divides the reconstruction loss by what it was before training, in the
            mean of the samples seen, so that alpha means the same for all policies; it costs one
            forward pass more up to the layer.

    Raises:
        LayerError: If the layers do not exist, are not in order, hold no parameter to train, or
            share one with the frozen rest, or the statistics of a norm.
        UnsupportedOpsError: If the frozen tail cannot be inverted.
        TargetError: If alpha or `weighing` is none that there is.
        ModelError, TraceError, PolicyError, BackendError: As `frfx.invert` does.

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
        output: str | int | None = None,
        classification_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        reconstruction_loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        weighing: str = "paper",
    ) -> None:
        super().__init__()
        check_model(model)
        if not 0 <= alpha <= 1:
            raise TargetError(f"alpha weighs two losses (Eq. 3): it lies in [0, 1], not at {alpha}")
        if weighing not in ("paper", "relative"):
            raise TargetError(f'weighing is "paper" or "relative", not {weighing!r}')
        self.alpha = alpha
        self.scale = Scale() if weighing == "relative" else None
        self.classification_loss = classification_loss
        self.reconstruction_loss = reconstruction_loss
        traced = trace(evaluation_view(model), example_input, output)
        network = Network(traced)
        start, end, logits = network.find(freeze_upto), network.find(upto_layer), network.logits()
        trained_nodes = _between(network, start, end)
        self._trained = _trained_parameters(network, trained_nodes, start, end)
        self._modules_trained = _trained_modules(traced, trained_nodes)
        _warn_of_mode(traced, trained_nodes)
        self._gives_probabilities = op_type(network.output, traced.root) is vocabulary.softmax
        self.to_feature = forward_module(traced, (end,))
        self.to_output = forward_module(traced, (end, logits))
        self.targets = None
        self._unchecked = traced if alpha == 0 else None  # what reconstructs checks its own graph
        if alpha > 0:
            self.targets = Targets(
                model,
                [*self._trained, *self.trained_buffers()],
                upto_layer=upto_layer,
                policy=policy,
                backend=backend,
                example_input=example_input,
                output=output,
            )
        trained = {id(parameter) for parameter in self._trained}
        self._others = [p for p in model.parameters() if id(p) not in trained]
        self._frozen: list[nn.Parameter] = []
        self._freeze()
        self.train()

    def forward(self, x: Tensor, y: Tensor, target: Tensor | None = None) -> Losses:
        """Return the losses of a batch.

        Args:
            x: The input batch.
            y: Integer labels (N,), or what the losses and the policy take as an output target.
            target: The reconstructed feature `a*` of this batch, if it is known already.

        Returns:
            The total loss and its parts.

        Raises:
            InputError, TargetError, NonFiniteError: As a call of the inverse does, or if `target`
                has not the shape of the feature.
            TraceMismatchError: If the graph does not compute what the model computes.
        """
        if self._unchecked is not None:
            _check_graph(self._unchecked, x)
            self._unchecked = None
        if self.targets is not None and target is None:
            target = self.reconstruct(x, y)
        if self.alpha == 1:
            (feature,) = self.to_feature(x)
            output = classification = None
        else:
            feature, output = self.to_output(x)
            self._check_probabilities(y)
            classification = self.classification_loss(output, y)
        reconstruction = None
        if target is not None and self.targets is not None:
            if target.shape != feature.shape:
                raise TargetError(
                    f"a target of shape {tuple(target.shape)} for a feature of shape "
                    f"{tuple(feature.shape)}: they must be the same"
                )
            reconstruction = self.reconstruction_loss(feature, target)
        total = combine(self.alpha, classification, self._weighed(reconstruction, x, target))
        return Losses(total, classification, reconstruction, output)

    def _check_probabilities(self, y: Tensor) -> None:
        """Raise `TargetError` for float labels that cross_entropy would misread."""
        if self.classification_loss is not F.cross_entropy or not y.is_floating_point():
            return
        if y.ndim < 2 or not torch.allclose(y.sum(1), y.new_ones(()), rtol=0, atol=1e-2):
            raise TargetError(
                "cross_entropy reads float labels as probabilities of the classes, and these do "
                "not add up to 1: give another classification_loss, such as F.mse_loss"
            )

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the target `a*` of a batch, as a call makes it: by the network before training.

        Args:
            x: The input batch.
            y: As for a call.

        Raises:
            TargetError: If alpha is 0, or the two losses would read the labels in different ways.
            InputError, NonFiniteError, TraceMismatchError: As a call does.
        """
        if self.targets is None:
            raise TargetError("alpha is 0: nothing is reconstructed")
        reads_probabilities = self.alpha < 1 and self.classification_loss is F.cross_entropy
        if reads_probabilities and not self._gives_probabilities and y.is_floating_point():
            raise TargetError(
                "cross_entropy reads float labels as probabilities, and the inverse as the output "
                "of the network, which does not end in softmax: give integer labels, or a "
                "classification_loss that takes such an output, or `target`"
            )
        return self.targets(x, y)

    def _weighed(
        self, reconstruction: Tensor | None, x: Tensor, target: Tensor | None
    ) -> Tensor | None:
        """Return the reconstruction loss as Eq. 3 takes it."""
        if reconstruction is None or target is None or self.targets is None or self.scale is None:
            return reconstruction
        if self.training:
            # In the same mode, for what batch norm and dropout add is no less before training.
            with torch.no_grad():
                (feature,) = self.targets.before(self.to_feature)(x)
                before = self.reconstruction_loss(feature, target)
            self.scale.update(before, len(x))
        return self.scale.divide(reconstruction)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the trained layers, in forward order."""
        return list(self._trained)

    def trained_buffers(self) -> list[Tensor]:
        """Return the buffers of the trained layers, which training may change, too."""
        return [buffer for module in self._modules_trained for buffer in module.buffers(False)]

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters and buffers, by their names in the model."""
        names: dict[int, str] = {}
        for name, tensor in named_tensors(self.to_feature).items():
            names.setdefault(id(tensor), name.removeprefix("model."))
        tensors = [*self.trained_parameters(), *self.trained_buffers()]
        return {names[id(tensor)]: tensor for tensor in tensors}

    def _freeze(self) -> None:
        for parameter in self._others:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def restore(self) -> None:
        """Give every frozen parameter its gradient back; the trained weights stay as they are."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def train(self, mode: bool = True) -> PostTraining:
        """Set the mode of the trained layers; the frozen ones stay in evaluation mode."""
        # Not by the model's own train(): the view is in evaluation mode, and that may write.
        self.training = mode
        for module in self._modules_trained:
            module.training = mode
        return self

    def __enter__(self) -> PostTraining:
        self._freeze()  # again, where this is not the first time
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


def _trained_modules(traced: Traced, trained_nodes: list[fx.Node]) -> list[nn.Module]:
    """Return the modules of the trained layers, of which the frozen layers call none.

    A module that both call (a dropout, an activation) gets a twin for the trained layers, so that
    their mode is not that of the frozen ones.

    Raises:
        LayerError: If such a module keeps statistics, which training would change for both.
    """
    root, trained = traced.root, set(trained_nodes)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    frozen = {id(root.get_submodule(str(n.target))) for n in calls if n not in trained}
    modules: list[nn.Module] = []
    for node in (node for node in calls if node in trained):
        module = root.get_submodule(str(node.target))
        if id(module) in frozen:
            if any(getattr(part, "track_running_stats", False) for part in module.modules()):
                raise LayerError(
                    f"the statistics of {node.target!r} are used by the trained and by the "
                    "frozen layers: they cannot be trained and frozen at once"
                )
            module = evaluation_view(module)
            node.target = f"_frfx_trained_{node.name}"
            root.add_module(node.target, module)
        modules += module.modules()
    return list(dict.fromkeys(modules))


def _warn_of_mode(traced: Traced, trained_nodes: list[fx.Node]) -> None:
    """Warn of what would compute something else in training, but is no module in the graph."""
    kinds = (vocabulary.batch_norm, vocabulary.dropout, vocabulary.stochastic_depth)
    functions = [node for node in trained_nodes if node.op != "call_module"]
    fixed = [traced.paths[n] for n in functions if op_type(n, traced.root) in kinds]
    if fixed:
        warnings.warn(
            f"{traced.front_end} has traced {', '.join(map(repr, fixed))} of the trained layers as "
            "functions: while training, too, they compute what they do in evaluation mode",
            ModeWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _check_graph(traced: Traced, x: Tensor) -> None:
    """Raise `TraceMismatchError` if a graph does not compute what the model computes."""
    traced = replace(traced, root=evaluation_view(traced.root))  # not in the mode of training
    if x.is_floating_point():  # autocast may have brought it in another type
        x = x.to(next(traced.root.parameters()).dtype)
    output = run_forward(traced, x).output
    with torch.autocast(x.device.type, enabled=False):
        same = is_output(output, traced, x)
    if not same:
        raise TraceMismatchError(
            "the graph that is trained does not compute what the model computes: its forward "
            "probably depends on the input's values or type. Give example_input, or rewrite that "
            "part of the forward"
        )


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
