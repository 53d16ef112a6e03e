"""Which rules and options where: a policy is a value that `invert` takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from frfx import registry
from frfx.errors import PolicyError, nearest
from frfx.joint.options import JointOptions
from frfx.ops import Op
from frfx.rules.base import Rule, check_choice, check_size

Branches = Literal["region", "rules"]
BRANCHES = ("region", "rules")


@dataclass(frozen=True)
class Override:
    """What a policy does differently at a node or an op."""

    rule: Rule | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    branches: Branches | None = None


@dataclass(frozen=True)
class Policy:
    """A choice of one rule per op, with the options of every rule.

    Attributes:
        principle: Which of an op's rules is taken where there are several.
        options: Options by name; each rule takes those it has.
        by_op: Overrides by op type name.
        by_node: Overrides by node, named as `frfx.layers` lists it.
        joint: How what lies below the layerwise rules is inverted as a whole; None where every op
            has its rule.
        branches: What is done where the network branches: ``"region"`` solves the smallest part
            around it that has one input and one output through its whole Jacobian; ``"rules"``
            inverts op by op, and averages the answers for a feature that several ops read.
        trust_region: Bound on `||x* - x^|| / ||x^||` of every step and sample; None for none.

    Raises:
        PolicyError: If an option cannot have its value.
    """

    principle: str
    options: Mapping[str, Any] = field(default_factory=dict)
    by_op: Mapping[str, Override] = field(default_factory=dict)
    by_node: Mapping[str, Override] = field(default_factory=dict)
    joint: JointOptions | None = None
    branches: Branches = "region"
    trust_region: float | None = None

    def __post_init__(self) -> None:
        _check_options(self.options)
        check_choice("branches", self.branches, BRANCHES)
        radius = self.trust_region
        if radius is not None and not (isinstance(radius, (int, float)) and 0 < radius < math.inf):
            raise PolicyError(f"trust_region is a finite number above 0, or None, not {radius!r}")

    def override(
        self,
        *,
        op: Hashable | None = None,
        node: str | None = None,
        rule: Rule | None = None,
        branches: Branches | None = None,
        **options: Any,
    ) -> Policy:
        """Return a policy that differs at one node, or at every node of one op.

        Args:
            op: Any spelling of the op (`torch.nn.Conv2d`, `torch.tanh`, ...).
            node: A node's name; wins over `op`.
            rule: The rule to use there; None keeps the policy's own.
            branches: What is done about the branches that meet there; None keeps the policy's own.
            **options: Options for the rule there, such as `damping=1e-2`.

        Raises:
            PolicyError: If not exactly one of `op` and `node` is given, or an option does not exist
                or cannot have its value. Whether the node exists is asked by `invert`.
            RegistryError: If no op is spelled so.
        """
        if (op is None) == (node is None):
            raise PolicyError("name either an op or a node to override")
        if rule is not None and not isinstance(rule, Rule):
            raise PolicyError(f"a rule is an instance of frfx.rules.Rule, not {rule!r}")
        if rule is not None and options:
            raise PolicyError("give the options to the rule itself, as in LinearRule(damping=1e-2)")
        _check_options(options)
        if branches is not None:
            check_choice("branches", branches, BRANCHES)
        change = Override(rule, options, branches)
        if node is not None:
            return replace(self, by_node=_changed(self.by_node, node, change))
        return replace(self, by_op=_changed(self.by_op, registry.resolve(op).name, change))

    def branches_at(self, op: Op) -> Branches:
        """Return what is done about the branches that meet at an op."""
        chosen = [change.branches for change in self._changes(op) if change.branches is not None]
        return chosen[-1] if chosen else self.branches

    def rule_at(self, op: Op) -> Rule | None:
        """Return the rule that the node itself has been given, if any."""
        change = self._at_node(op)
        return None if change is None else change.rule

    def _at_node(self, op: Op) -> Override | None:
        """Return what the node has been given, by its path or its name."""
        given = [change for name, change in self.by_node.items() if name in (op.path, op.name)]
        return functools.reduce(_joined, given) if given else None

    def _changes(self, op: Op) -> list[Override]:
        """Return the overrides for an op, the strongest last."""
        by_op = self.by_op.get(op.type.name) if op.type else None
        return [change for change in (by_op, self._at_node(op)) if change is not None]

    def rule_for(self, op: Op) -> Rule | None:
        """Return the rule for an op, with its options; None if there is none."""
        factory: Callable[..., Rule] | None = registry.default.find(op.type, self.principle)
        taken = [] if factory is None else registry.option_names(factory)
        options = dict(self.options)
        for change in self._changes(op):
            if change.rule is not None:
                factory, options = functools.partial(replace, change.rule), {}
                taken = [field.name for field in fields(change.rule)]
            options |= change.options
        if factory is None:
            return None
        return factory(**{name: value for name, value in options.items() if name in taken})

    def unread_options(self, op: Op, rule: Rule) -> list[str]:
        """Return the options that the node itself has been given and that its rule does not have.

        Args:
            op: What is inverted there.
            rule: Its rule.
        """
        change = self._at_node(op)
        known = {field.name for field in fields(rule)}
        return [] if change is None else [name for name in change.options if name not in known]

    def check_nodes(self, names: set[str], inside: set[str]) -> None:
        """Raise `PolicyError` for overrides of nodes that have no step of their own.

        Args:
            names: The nodes that have one.
            inside: The nodes of the tail, those inside of regions among them.
        """
        for node in self.by_node:
            if node in names:
                continue
            if node in inside:
                raise PolicyError(
                    f"the policy overrides {node!r}, which has no step of its own: it lies inside "
                    "of a region, or is held at its forward value. Override the node that the "
                    'region ends in, or take its ops by their rules: branches="rules"'
                )
            raise PolicyError(
                f"the policy overrides {node!r}, which is no node between the layer and the "
                f"output.{nearest(node, names)}"
            )


def _changed(overrides: Mapping[str, Override], name: str, change: Override) -> dict[str, Override]:
    """Return the overrides with one more; options join those that are there."""
    return {**overrides, name: _joined(overrides.get(name, Override()), change)}


def _joined(before: Override, change: Override) -> Override:
    """Return two overrides as one, in which the second wins."""
    if change.rule is None:
        change = replace(change, rule=before.rule, options={**before.options, **change.options})
    return replace(change, branches=change.branches or before.branches)


def _check_options(options: Mapping[str, Any]) -> None:
    known = registry.default.options()
    for name, value in options.items():
        if name not in known:
            raise PolicyError(
                f"no rule takes an option {name!r}.{nearest(name, known)} "
                f"Options: {', '.join(sorted(known))}"
            )
        check_size(name, value)


def paper(
    *,
    label_margin: float = 0.0,
    clamp_margin: float = 1e-3,
    rcond: float | None = None,
    damping: float | None = None,
    branches: Branches = "region",
    trust_region: float | None = None,
) -> Policy:
    """Return the paper's choices: copy through max pooling, ReLU as the identity, ties at labels.

    Args:
        label_margin: By how much the label wins after embedding; the paper's is 0, a tie.
        clamp_margin: How far targets stay from an end of a range that an activation does not
            reach, relative to half the range; of a range with one end, to that end's distance
            from 0, or absolute if that is 0; of softmax, to 1/K. The paper names no value.
        rcond: Singular values up to this share of the largest count as zero; None for the
            machine epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value, for all;
            None for what each rule finds necessary: 1e-2 for regions, for attention and products
            with what they hold, and for padded convolutions that are ill-conditioned; else 0.
        branches: What is done where the network branches: ``"region"`` solves the smallest part
            around it that has one input and one output through its whole Jacobian; ``"rules"``
            inverts op by op, and averages the answers for a feature that several ops read.
        trust_region: Bound on `||x* - x^|| / ||x^||` of every step and sample; None for none.

    Raises:
        PolicyError: If an option cannot have its value.
    """
    options = {"label_margin": label_margin, "clamp_margin": clamp_margin, "rcond": rcond}
    if damping is not None:
        options["damping"] = damping
    return Policy("paper", options, branches=branches, trust_region=trust_region)


def minimal(
    *,
    margin: float = 0.5,
    clamp_margin: float = 1e-3,
    rcond: float | None = None,
    damping: float | None = None,
    branches: Branches = "region",
    trust_region: float | None = None,
) -> Policy:
    """Return the minimal-deviation choices: the nearest preimage through every op.

    Args:
        margin: By how much the label wins after embedding, in units of the logits.
        clamp_margin: How far targets stay from an end of a range that an activation does not
            reach, relative to half the range; of a range with one end, to that end's distance
            from 0, or absolute if that is 0; of softmax, to 1/K.
        rcond: Singular values up to this share of the largest count as zero; None for the
            machine epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value, for all;
            None for what each rule finds necessary: 1e-2 for regions, for attention and products
            with what they hold, and for padded convolutions that are ill-conditioned; else 0.
        branches: What is done where the network branches: ``"region"`` solves the smallest part
            around it that has one input and one output through its whole Jacobian; ``"rules"``
            inverts op by op, and averages the answers for a feature that several ops read.
        trust_region: Bound on `||x* - x^|| / ||x^||` of every step and sample; None for none.

    Raises:
        PolicyError: If an option cannot have its value.
    """
    return replace(
        paper(
            label_margin=margin,
            clamp_margin=clamp_margin,
            rcond=rcond,
            damping=damping,
            branches=branches,
            trust_region=trust_region,
        ),
        principle="minimal",
    )


def joint(
    *,
    margin: float = 0.01,
    constraint: str = "inequality",
    steps: int = 12,
    tolerance: float = 1e-2,
    classes: int = 8,
    iterations: int = 100,
    unreached: str = "warn",
    start: str | int | None = None,
    regions: str | Sequence[str] = (),
    layerwise: Policy | None = None,
) -> Policy:
    """Return the choice to invert the tail of the network as one function.

    Among the features from which the network reaches its target, the one nearest to the forward
    feature, by sequential quadratic programming: the label survives to any depth, and nothing needs
    a rule. Integer labels ask that they win; a float target is to be met as it is, by matrix-free
    conjugate gradients. The result carries no gradient. `inverse.report` tells of every sample how
    it went.

    Args:
        margin: By how much the label wins, in units of the logits. A hundredth of it may be missing
            where the label counts as reached.
        constraint: For labels: ``"inequality"`` lets every logit move as long as the label wins by
            the margin; ``"equality"`` asks for the nearest embedding of the logits, and is what
            dense labels (N, H, W) need.
        steps: How many linearisations at most.
        tolerance: A sample that has reached its target stops where a step would bring its deviation
            down by less than this share.
        classes: How many classes beside the label are looked at in one step, those most in the way.
        iterations: Bound on those of the conjugate gradients in one step, for float targets and
            equality. With few, a step stays short where the tail is nearly singular.
        unreached: What to do about samples that have not reached their target after the last step:
            ``"warn"``, ``"raise"`` or ``"ignore"``. They come back as near to it as they came.
        start: A node on every path to the output: the ops behind it are inverted by their rules,
            what lies before it jointly. These rules turn the label into a feature, a float target
            for the rest: `constraint` and `classes` then play no role. None for all of it.
        regions: Nodes on every path to the output at which the joint part is cut: one region after
            the other meets the feature that the one behind it asks for.
        layerwise: Rules for the ops behind `start` and behind the logits; None for
            `minimal(margin=margin)`. It bounds no steps: joint inversion has a limit of its own.

    Raises:
        PolicyError: If an option is out of its range, or `layerwise` has a `trust_region`.
    """
    if layerwise is not None and layerwise.trust_region is not None:
        raise PolicyError(
            f"layerwise has trust_region={layerwise.trust_region!r}: it would shorten what joint "
            "inversion has found, and reports. Leave it out"
        )
    options = JointOptions(
        steps=steps,
        margin=margin,
        constraint=constraint,
        classes=classes,
        iterations=iterations,
        tolerance=tolerance,
        unreached=unreached,
        start=start,
        regions=tuple([regions] if isinstance(regions, str) else regions),
    )
    return replace(minimal(margin=margin) if layerwise is None else layerwise, joint=options)


_NAMED: dict[str, Callable[[], Policy]] = {"paper": paper, "minimal": minimal, "joint": joint}


def resolve(policy: Policy | str) -> Policy:
    """Return the policy that a name stands for, or the policy itself.

    Raises:
        PolicyError: If there is no such policy.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in _NAMED:
        known = ", ".join(map(repr, _NAMED))
        hint = nearest(policy, _NAMED) if isinstance(policy, str) else ""
        raise PolicyError(f"no policy {policy!r}.{hint} Known: {known}")
    return _NAMED[policy]()


__all__ = ["Override", "Policy", "joint", "minimal", "paper", "resolve"]
