"""invert() and layers(): the whole pipeline on one screen."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor, nn

from frfx.compiler.coverage import coverage
from frfx.compiler.emit import emit
from frfx.compiler.inverse import Inverse
from frfx.compiler.plan import make_plan
from frfx.compiler.probe import run_forward
from frfx.compiler.tail import Layers, Network
from frfx.compiler.trace import check_batch, trace
from frfx.errors import ModeWarning
from frfx.linalg.backend import get_backend
from frfx.policy import Policy, resolve
from frfx.view import check_model, evaluation_view, mode_dependent


def invert(
    model: nn.Module,
    upto_layer: int | str,
    *,
    policy: Policy | str = "paper",
    backend: str = "auto",
    example_input: Tensor | None = None,
    output: str | int | None = None,
) -> Inverse:
    """Compile a trained network into the graph that runs it backwards down to a layer.

    While it traces, torch.fx patches `nn.Module` for all threads: none may run a model meanwhile.

    Args:
        model: The network; one input tensor (N, ...), one output tensor, or several of which
            `output` names one. It is not changed. In whatever mode it is, it is inverted as in
            evaluation mode.
        upto_layer: Where to stop: the paper's `l_R` (its layers: one convolution or linear op with
            its activation and pooling; `a_l` is what the next one reads, L the logits, 0 the
            input), or the name of a node as torchvision's feature extraction spells it.
            `frfx.layers(model)` lists both.
        policy: ``"paper"``, ``"minimal"``, ``"joint"``, or a value of `frfx.policy`.
        backend: What runs the inverse: ``"torch"``, on the device of the model; ``"cupy"``, which
            also applies the solvers of convolutions with CuPy, on its GPU; ``"auto"``, torch, and
            on a GPU, where CuPy is installed, kernels for what torch takes many for.
        example_input: A batch. Not needed, except for models that symbolic tracing cannot follow,
            or gets wrong, and `torch.export` can; if it is given, everything that depends on the
            image size is made ready at once.
        output: Which tensor to start from, if the model returns several in a dict, a tuple, a named
            tuple or a dataclass: its key, index or name. None for the only one, or for ``"out"``,
            as torchvision's segmentation models call it.

    Returns:
        A module: `inverse(x, target)` is the feature `a*` that the layer should have produced.

    Raises:
        ModelError: If the model holds no values.
        LayerError: If there is no such layer, or no such output.
        TraceError: If the model cannot be traced.
        UnsupportedOpsError: If some ops on the way have no rule; names all of them.
        BackendError: If the backend cannot be had.
        PolicyError: If the policy names what does not exist.
        InputError, NonFiniteError, TraceMismatchError: As a call does, if `example_input` is given.
    """
    check_model(model)
    array_library = get_backend(backend)
    _warn_of_mode(model)
    chosen = resolve(policy)
    if example_input is not None:
        check_batch(example_input)
    traced = trace(evaluation_view(model), example_input, output)
    if example_input is not None:
        check_batch(example_input, traced.sizes)
    network = Network(traced)
    tail = network.tail(network.find(upto_layer))
    shapes = None if example_input is None else run_forward(traced, example_input).shapes
    plan = make_plan(network, tail, chosen, shapes)
    recipe = functools.partial(
        invert,
        upto_layer=upto_layer,
        policy=chosen,
        backend=backend,
        example_input=example_input if traced.front_end == "torch.export" else None,
        output=output,
    )
    inverse = Inverse(traced, plan, emit(traced, plan, array_library), recipe)
    if example_input is not None:
        inverse.prepare.ready(example_input)
    return inverse


def layers(
    model: nn.Module,
    example_input: Tensor | None = None,
    output: str | int | None = None,
    *,
    upto_layer: int | str | None = None,
    policy: Policy | str = "paper",
) -> Layers:
    """List the places that a reconstruction may reach, with the paper's layer numbers.

    With `upto_layer`, list how `invert` would invert every op between that layer and the output,
    and what it cannot invert, without compiling anything.

    Args:
        model: The network; it is not changed.
        example_input: A batch, needed only for models that symbolic tracing cannot follow. With
            `upto_layer`, rules are also asked about what depends on the size of the image.
        output: Which tensor is the network's output, as for `invert`.
        upto_layer: Where a reconstruction would stop, as for `invert`; None for all nodes.
        policy: What would choose the rules, as for `invert`; read with `upto_layer` only.

    Returns:
        One row a node in forward order; prints as a table. Rows that are some `a_l` carry `l`. With
        `upto_layer`, the first row is the layer, each tells its `inversion`, and `.unsupported`
        has every op that cannot be inverted, with the reason and the way out.

    Raises:
        ModelError: If the model holds no values.
        LayerError: If there is no such layer, or no such output.
        TraceError: If the model cannot be traced.
        PolicyError: If the policy names what does not exist.
        InputError: If the model cannot take the example.
    """
    check_model(model)
    chosen = resolve(policy)
    if example_input is not None:
        check_batch(example_input)
    network = Network(trace(evaluation_view(model), example_input, output))
    if upto_layer is None:
        return network.layers()
    return coverage(network, network.find(upto_layer), chosen, example_input)


def _warn_of_mode(model: nn.Module) -> None:
    names = mode_dependent(model)
    if names:
        shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        warnings.warn(
            f"the model is in training mode, where {shown} compute something else. It is inverted "
            "as in evaluation mode, and stays as it is",
            ModeWarning,
            stacklevel=3,
        )
