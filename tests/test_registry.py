"""Registering rules: by every spelling of an op, once, and kept whole by the tracer."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import frfx
from frfx import ops, registry, vocabulary
from frfx.rules import Inversion, Rule


@pytest.fixture(autouse=True)
def _as_found():
    """Give registry and vocabulary back as they were."""
    rules, spellings = dict(registry.default._rules), dict(ops._SPELLINGS)
    yield
    registry.default._rules = rules
    ops._SPELLINGS.clear()
    ops._SPELLINGS.update(spellings)


def state():
    """Return what a registration changes."""
    return dict(registry.default._rules), dict(ops._SPELLINGS)


def cube(x, offset=0.0):
    """A function that the vocabulary does not know, of two arguments."""
    return x * x * x + offset


def uncube(y, offset=0.0):
    """Its inverse."""
    y = y - offset
    return y.sign() * y.abs() ** (1 / 3)


class Cube(nn.Module):
    """The same as a module."""

    def forward(self, x):
        return x * x * x


class Whole(nn.Module):
    """A user's module that no rule could invert in parts."""

    def forward(self, x):
        return x.cumsum(1) + torch.erf(x)


class PassInversion(Inversion):
    """Returns the target."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target


@dataclass(frozen=True)
class PassRule(Rule):
    """Inverts by doing nothing."""

    strength: float = 1.0

    def build(self, op) -> Inversion:
        return PassInversion()


class Net(nn.Module):
    """An op between two linear layers."""

    def __init__(self, op) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.op = op
        self.last = nn.Linear(5, 4)
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.last(self.op(self.first(x)))


class Named(Net):
    """Calls `cube` by its name in this file."""

    def forward(self, x):
        return self.last(cube(self.first(x)))


class Positional(Net):
    """Passes a further argument by its place."""

    def forward(self, x):
        return self.last(cube(self.first(x), 0.25))


class Keyword(Net):
    """Passes a further argument by its name."""

    def forward(self, x):
        return self.last(cube(self.first(x), offset=0.25))


class Attribute(Net):
    """Holds the function itself."""

    def forward(self, x):
        return self.last(self.op(self.first(x)))


class InDict(Net):
    """Looks the function up by a name."""

    def __init__(self, op) -> None:
        super().__init__(None)
        self.table = {"act": [op]}

    def forward(self, x):
        return self.last(self.table["act"][0](self.first(x)))


class Imported(Net):
    """Reaches the function through a module, and imports it when it is called."""

    def forward(self, x):
        from a_users_library import power

        return self.last(power(self.first(x)))


class Through(Net):
    """Reaches the function through the module that defines it."""

    def forward(self, x):
        return self.last(sys.modules["a_users_library"].power(self.first(x)))


@pytest.fixture
def library(monkeypatch):
    """Return a module of a user's own with a function in it."""
    module = types.ModuleType("a_users_library")
    exec("def power(x):\n    return x * x * x\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "a_users_library", module)
    return module


def batch():
    torch.manual_seed(1)
    return torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 4


# --- elementwise functions ---


@pytest.mark.parametrize("kind", [Named, Attribute, InDict])
def test_function_is_kept_whole(kind):
    frfx.register_elementwise(cube, inverse=uncube)
    model = kind(cube)
    inverse = frfx.invert(model, "first", policy="minimal")
    assert [row.node for row in inverse.summary()] == ["argmax", "last", "cube"]
    found = inverse.reconstruct(*batch())
    torch.testing.assert_close(cube(found.feature), found["cube"].target)
    torch.testing.assert_close(pickle.loads(pickle.dumps(inverse))(*batch()), found.feature)
    torch.testing.assert_close(copy.deepcopy(inverse)(*batch()), found.feature)


@pytest.mark.parametrize("kind", [Imported, Through])
def test_function_of_another_file_is_kept_whole(kind, library):
    frfx.register_elementwise(library.power, inverse=lambda y: y.sign() * y.abs() ** (1 / 3))
    inverse = frfx.invert(kind(None), "first", policy="minimal")
    assert inverse.summary()[2].node == "power"
    found = inverse.reconstruct(*batch())
    torch.testing.assert_close(cube(found.feature), found["power"].target)


def test_tracing_puts_every_function_back(library):
    frfx.register_elementwise(library.power, inverse=torch.asinh)
    frfx.register_elementwise(cube, inverse=uncube)
    power, here = library.power, cube
    frfx.invert(Imported(None), "first")
    model = Attribute(cube)
    frfx.invert(model, "first")
    assert library.power is power
    assert cube is here
    assert model.op is here


def shifted(x, value=1.0):
    return (x + value).exp()


def test_further_arguments_of_any_name():
    """Names of our own functions' arguments are no exception."""
    frfx.register_elementwise(
        shifted, inverse=lambda y, value=1.0: y.log() - value, range=(0, math.inf)
    )

    class Net(nn.Module):
        def forward(self, x):
            return shifted(torch.tanh(x), value=2.0)

    inverse = frfx.invert(Net(), "tanh")
    x = torch.randn(3, 4, dtype=torch.float64)
    target = shifted(torch.randn(3, 4, dtype=torch.float64), 2.0)
    torch.testing.assert_close(shifted(inverse(x, target), 2.0), target)


@pytest.mark.parametrize("kind", [Positional, Keyword])
def test_function_with_further_arguments(kind):
    """The inverse gets them by name."""
    frfx.register_elementwise(cube, inverse=uncube)
    found = frfx.invert(kind(None), "first", policy="minimal").reconstruct(*batch())
    torch.testing.assert_close(cube(found.feature, 0.25), found["cube"].target)


def stretched(x, **options):
    """A function that takes what it is given by name."""
    return x * options.get("by", 1.0)


class Stretched(Net):
    """Calls it."""

    def forward(self, x):
        return self.last(stretched(self.first(x), by=3.0))


def test_function_with_arguments_that_it_does_not_name():
    frfx.register_elementwise(stretched, inverse=lambda y, by=1.0: y / by)
    found = frfx.invert(Stretched(None), "first").reconstruct(*batch())
    torch.testing.assert_close(3 * found.feature, found["stretched"].target)


class TwoInputs(Net):
    """Gives the function two activations."""

    def forward(self, x):
        x = self.first(x)
        return self.last(cube(x, torch.tanh(x)))


def test_function_of_two_activations_is_refused():
    """As a part of a region it needs no rule; by its rule it has one activation."""
    frfx.register_elementwise(cube, inverse=uncube)
    rules = frfx.policy.paper(branches="rules")
    for layer, policy in [("first", rules), ("tanh", rules), ("tanh", "paper")]:
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            frfx.invert(TwoInputs(None), layer, policy=policy)
        (op,) = caught.value.ops
        assert op.path == "cube"
        assert op.reason == "it is applied to first, tanh, not to one activation"
    assert frfx.invert(TwoInputs(None), "first").summary()[-1].op == "region"


def test_method_and_function_together():
    frfx.register_elementwise((torch.exp, "exp"), inverse=torch.log, range=(0, math.inf))
    x, y = batch()
    for op in (torch.exp, lambda t: t.exp()):
        inverse = frfx.invert(Net(op), "first", policy="minimal")
        found = inverse.reconstruct(x, y)
        wanted = found["exp"].target.clamp(min=1e-3)
        torch.testing.assert_close(found.feature.exp(), wanted)
    assert vocabulary_names(torch.exp) == vocabulary_names("exp") == "exp"


def vocabulary_names(spelling) -> str:
    return ops.lookup(spelling).type.name


def test_module_class():
    frfx.register_elementwise(Cube, inverse=uncube)
    inverse = frfx.invert(Net(Cube()), "first", policy="minimal")
    found = inverse.reconstruct(*batch())
    torch.testing.assert_close(cube(found.feature), found["op"].target)
    row = inverse.summary()[2]
    assert (row.node, row.op, row.rule) == ("op", "Cube", "ElementwiseRule(Cube)")


def test_subclass_of_a_known_module_is_not_taken_for_it():
    """A user's own ReLU may do anything."""

    class Shifted(nn.ReLU):
        def forward(self, x):
            return torch.erf(x)

    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(Net(Shifted()), "first")
    assert [op.path for op in caught.value.ops] == ["op.erf"]


def test_aten_overload():
    """What torch.export leaves is registered under its own name."""

    class Exported(Net):
        def forward(self, x):
            if x.ndim != 2:
                raise ValueError("rank")
            return self.last(torch.erf(self.first(x)))

    x, y = batch()
    with pytest.raises(frfx.UnsupportedOpsError, match=r"@frfx.register_rule\(torch.ops.aten.erf"):
        frfx.invert(Exported(None), "first", example_input=x)
    frfx.register_elementwise(
        (torch.erf, torch.ops.aten.erf.default), inverse=torch.erfinv, range=(-1, 1)
    )
    expected = frfx.invert(Net(torch.erf), "first")(x, y)
    result = frfx.invert(Exported(None), "first", example_input=x)(x, y)
    torch.testing.assert_close(result, expected)


def test_nearest_preimage_of_a_function_that_is_not_injective():
    def nearest(y, x):
        root = y.sqrt()
        return torch.where(x < 0, -root, root)

    frfx.register_elementwise(
        (torch.square, "square"), nearest=nearest, range=(0, math.inf), attained=True
    )
    x, y = batch()
    found = frfx.invert(Net(torch.square), "first", policy="minimal").reconstruct(x, y)
    assert (found.feature * found["first"].forward >= 0).all()  # the root on the same side
    torch.testing.assert_close(found.feature**2, found["square"].target.clamp(min=0))


@pytest.mark.parametrize(("attained", "end"), [(True, 1.0), (False, 1 - 0.01)])
def test_targets_keep_a_margin_from_ends_that_are_not_attained(attained, end):
    frfx.register_elementwise(torch.erf, inverse=lambda y: y, range=(-1, 1), attained=attained)
    policy = frfx.policy.paper(clamp_margin=0.01)
    inverse = frfx.invert(Net(torch.erf), "first", policy=policy)
    result = inverse(0.01 * batch()[0], torch.full((5, 4), 50.0))
    assert float(result.abs().max()) == pytest.approx(end)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "give either `inverse`, a function of the target, or `nearest`"),
        ({"inverse": torch.log, "nearest": torch.log}, "give either `inverse`"),
        ({"inverse": torch.log, "range": (1, 1)}, r"the range \(1, 1\) is empty"),
        ({"inverse": torch.log, "range": (2, -2)}, r"the range \(2, -2\) is empty"),
    ],
)
def test_bad_elementwise_registrations(arguments, text):
    before = state()
    with pytest.raises(frfx.RegistryError, match=text):
        frfx.register_elementwise(torch.exp, **arguments)
    assert state() == before


# --- rules ---


def test_rule_for_a_users_module():
    with pytest.raises(frfx.UnsupportedOpsError):
        frfx.invert(Net(Whole()), "first", policy=frfx.policy.paper(branches="rules"))
    assert frfx.register_rule(Whole)(PassRule) is PassRule
    inverse = frfx.invert(Net(Whole()), "first")
    assert [row.node for row in inverse.summary()] == ["argmax", "last", "op"]
    assert inverse.summary()[2].rule == "PassRule"
    found = inverse.reconstruct(*batch())
    torch.testing.assert_close(found.feature, found["op"].target)


def test_options_of_a_users_rule_come_from_the_policy():
    frfx.register_rule(Whole)(PassRule)
    policy = frfx.policy.paper().override(op=Whole, strength=3.0)
    inverse = frfx.invert(Net(Whole()), "first", policy=policy)
    assert inverse.plan.steps[-1].rule == PassRule(3.0)


def test_the_line_that_an_error_advises_works():
    """Copy the remedy, and the model inverts."""
    model = Net(torch.erf)
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, "first")
    (op,) = caught.value.ops
    line = op.remedy.partition(" on a subclass")[0].removeprefix("@")
    eval(line, {"frfx": frfx, "torch": torch})(PassRule)
    assert frfx.invert(model, "first").summary()[2].rule == "PassRule"


@pytest.mark.parametrize(
    "spellings",
    [(nn.ReLU,), (torch.relu,), ("relu",), (torch.ops.aten.relu.default,), (vocabulary.relu,)],
    ids=["module", "function", "method", "aten", "type"],
)
def test_duplicate_needs_overwrite(spellings):
    """Whatever the spelling: it is one op."""
    before = state()
    with pytest.raises(frfx.RegistryError) as caught:
        frfx.register_rule(*spellings, principle="paper")(PassRule)
    text = "there is a rule for 'relu' under 'paper' already: ReluIdentityRule. "
    assert str(caught.value) == text + "Pass overwrite=True to replace it"
    assert state() == before
    frfx.register_rule(*spellings, principle="paper", overwrite=True)(PassRule)
    for op in (nn.ReLU(), torch.relu, lambda t: t.relu(), nn.functional.relu):
        assert frfx.invert(Net(op), "first").summary()[2].rule == "PassRule"
        summary = frfx.invert(Net(op), "first", policy="minimal").summary()
        assert summary[2].rule == "ElementwiseRule(relu)"


def test_a_rule_for_all_would_not_be_used_where_principles_have_their_own():
    before = state()
    for op in (nn.ReLU, nn.MaxPool2d, torch.sin):
        with pytest.raises(
            frfx.RegistryError, match=r"there is a rule for '\w+' under '\w+' already"
        ):
            frfx.register_rule(op)(PassRule)
    assert state() == before


def test_overwriting_without_a_principle_serves_every_policy():
    frfx.register_rule(nn.ReLU, overwrite=True)(PassRule)
    for policy in ("paper", "minimal"):
        assert frfx.invert(Net(nn.ReLU()), "first", policy=policy).summary()[2].rule == "PassRule"
    with pytest.raises(frfx.RegistryError, match="there is a rule for 'relu' already: PassRule"):
        frfx.register_rule(torch.relu)(PassRule)


def test_the_same_decorator_twice_is_a_duplicate():
    register = frfx.register_rule(Whole)
    register(PassRule)
    with pytest.raises(frfx.RegistryError, match="there is a rule for 'Whole' already"):
        register(PassRule)


def test_new_spelling_of_a_known_op():
    """Named beside a known one, it gets that op's rules, its place among layers included."""

    def dense(input, weight, bias):
        return nn.functional.linear(input, weight, bias)

    globals()["dense"] = dense

    class Dense(Net):
        def forward(self, x):
            return self.last(dense(torch.tanh(x), self.first.weight, self.first.bias))

    try:
        frfx.register_rule(vocabulary.linear, dense, overwrite=True)(frfx.rules.LinearRule)
        model = Dense(None)
        model.forward = types.MethodType(_dense_forward, model)
        x, y = batch()
        expected = frfx.invert(nn.Sequential(nn.Tanh(), model.first, model.last), "0")(x, y)
        torch.testing.assert_close(frfx.invert(model, "tanh")(x, y), expected)
        assert [row.index for row in frfx.layers(model)] == [0, None, 1, 2]
    finally:
        del globals()["dense"]


def _dense_forward(self, x):
    return self.last(dense(torch.tanh(x), self.first.weight, self.first.bias))  # noqa: F821


def test_one_spelling_of_two_ops_is_refused():
    before = state()
    with pytest.raises(frfx.RegistryError) as caught:
        frfx.register_rule(nn.ReLU, nn.Tanh, cube, overwrite=True)(PassRule)
    assert "is named beside 'relu' and 'tanh': register it with one of them" in str(caught.value)
    assert state() == before


def test_several_known_ops_at_once():
    frfx.register_rule(nn.ReLU, nn.Tanh, overwrite=True)(PassRule)
    for op in (torch.relu, torch.tanh):
        assert frfx.invert(Net(op), "first").summary()[2].rule == "PassRule"


def test_failed_registration_of_several_ops_changes_nothing():
    before = state()
    with pytest.raises(frfx.RegistryError):
        frfx.register_rule(vocabulary.conv_transpose, vocabulary.tanh)(PassRule)
    with pytest.raises(frfx.RegistryError):
        frfx.register_rule(torch.tanh, cube)(PassRule)
    assert state() == before


def gelu(x):
    """Called like an op of the vocabulary, and another."""
    return x + 1


def test_ops_of_one_name_stay_apart():
    frfx.register_elementwise(gelu, inverse=lambda y: y - 1)
    assert vocabulary_names(gelu) != vocabulary_names(nn.GELU)
    policy = frfx.policy.paper().override(op=gelu, clamp_margin=0.3)

    class Both(Net):
        def forward(self, x):
            return self.last(nn.functional.gelu(gelu(self.first(x))))

    steps = frfx.invert(Both(None), "first", policy=policy).plan.steps
    margins = {step.op.path: getattr(step.rule, "clamp_margin", None) for step in steps}
    assert (margins["gelu"], margins["gelu_1"]) == (0.3, 1e-3)


BAD_SPELLINGS = {
    "nothing": ((), "name the op: a module class, function, method name or ATen overload"),
    "number": ((3,), "3 is no module class, function, method or ATen overload"),
    "None": ((None,), "None is no module class"),
    "list": (([nn.ReLU],), "is no module class, function, method or ATen overload"),
    "no method": (("rleu",), "tensors have no method 'rleu'"),
    "no module": ((int,), "int is no torch.nn.Module"),
    "instance": ((nn.ReLU(),), r"ReLU\(\) is .*: name its class,? ReLU"),
    "packet": (
        (torch.ops.aten.relu,),
        r"torch.ops.aten.relu has several overloads; name them: torch.ops.aten.relu.default",
    ),
}


@pytest.mark.parametrize("case", BAD_SPELLINGS)
def test_bad_spellings(case):
    spellings, text = BAD_SPELLINGS[case]
    before = state()
    with pytest.raises(frfx.RegistryError, match=text):
        frfx.register_rule(*spellings)(PassRule)
    if spellings and spellings[0] is not None:
        with pytest.raises(frfx.RegistryError, match=text):
            frfx.policy.paper().override(op=spellings[0], damping=1.0)
    assert state() == before


def test_override_of_an_op_that_nobody_registered():
    with pytest.raises(frfx.RegistryError, match=r"no op is spelled torch\.erf; register a rule"):
        frfx.policy.paper().override(op=torch.erf, damping=1.0)


# --- what belongs to packages that frfx does not import ---


def in_a_module(name, monkeypatch, **contents):
    """Import a module of this name with these functions and classes, as if it defined them."""
    module = types.ModuleType(name)
    for key, value in contents.items():
        value.__module__, value.__qualname__ = name, key
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("kind", ["function", "module"])
def test_spelled_by_name_before_it_is_imported(kind, monkeypatch):
    name = f"somewhere.else:{kind}"
    frfx.register_rule(name)(PassRule)
    assert frfx.registry.resolve(name) is ops.lookup(name).type

    class Inner(nn.Module):
        def forward(self, x, strength=2):
            return x + torch.tanh(x) * strength

    def outer(x, strength=2):
        return x + torch.tanh(x) * strength

    spelled = {"function": outer, "module": Inner}[kind]
    assert ops.lookup(spelled) is None
    in_a_module("somewhere.else", monkeypatch, **{kind: spelled})
    assert ops.lookup(spelled) is ops.lookup(name)
    assert ops.describe(spelled) == ops.describe(name) == f"somewhere.else.{kind}"
    known = ops.functions() if kind == "function" else ops.module_classes()
    assert spelled in known
    inverse = frfx.invert(Net(spelled if kind == "function" else spelled()), "first")
    assert [row.rule for row in inverse.summary()][-1] == "PassRule"


def test_another_of_the_same_name_is_another(monkeypatch):
    frfx.register_rule("somewhere.else:outer")(PassRule)

    def outer(x):
        return x

    assert ops.lookup(outer) is None
    other = in_a_module("somewhere.other", monkeypatch, outer=outer)
    assert ops.lookup(other.outer) is None
    assert outer not in ops.functions()


def test_torchvision_is_imported_by_those_who_use_it():
    code = "import sys, frfx; frfx.ops.functions(); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the registry as a value ---


def test_registry_copies_are_independent():
    twin = registry.default.copy()
    twin.add(vocabulary.relu, PassRule, None, overwrite=True)
    assert twin.find(vocabulary.relu, "paper") is PassRule
    assert registry.default.find(vocabulary.relu, "paper") is not PassRule
    entries = registry.default.entries()
    assert (vocabulary.linear, None, frfx.rules.LinearRule) in entries
    assert len({(op, principle) for op, principle, _ in entries}) == len(entries)


def test_every_rule_of_the_vocabulary_has_an_equation():
    for op, _, factory in registry.default.entries():
        assert factory().equation, op


def test_every_op_is_found_by_every_spelling():
    """No spelling is lost to a later entry, and modules and methods agree with functions."""
    few = {vocabulary.region: 0, vocabulary.multi_head_attention: 1}
    for op in (o for o in vars(vocabulary).values() if isinstance(o, ops.OpType)):
        found = [s for s, entry in ops._SPELLINGS.items() if entry.type is op]
        if op in few:  # no program spells a region; only the module of attention is traced whole
            assert len(found) == few[op], op
        else:  # what another package defines for itself may have that one name
            assert len(found) >= (1 if all(map(ops.is_lazy, found)) else 2), op


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        (nn.Conv2d, "torch.nn.Conv2d"),
        (nn.functional.max_pool2d, "torch.nn.functional.max_pool2d"),
        (torch.tanh, "torch.tanh"),
        (nn.functional.gelu, "torch.nn.functional.gelu"),
        (torch.ops.aten.relu.default, "torch.ops.aten.relu.default"),
        (torch.ops.aten.relu, "torch.ops.aten.relu"),
        ("view", '"view"'),
        (torch.nn.functional.normalize, "torch.nn.functional.normalize"),
    ],
)
def test_spellings_are_described_as_programs_write_them(spelling, text):
    assert ops.describe(spelling) == text
    assert eval(text, {"torch": torch}) in (spelling, text.strip('"'))
