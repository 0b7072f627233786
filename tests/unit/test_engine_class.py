"""The class of an engine: whatever class the model has, the engine is an instance of it."""

import abc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn

from autopar import auto_engine
from autopar.errors import CaptureError, EngineError

T = TypeVar("T")
X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def check(build: Callable[[], Any], steps: int = 3) -> Any:
    """Train a model and an engine of the same; returns the engine."""
    torch.manual_seed(0)
    alone = build()
    torch.manual_seed(0)
    other = build()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, other)]
    engine, _ = auto_engine(other, optimizers[1], "1", progress=None)
    assert isinstance(engine, type(other)) and type(engine).__name__ == type(other).__name__
    for _ in range(steps):
        losses = []
        for model, optimizer in zip((alone, engine), optimizers, strict=True):
            loss = model(X).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    return engine


# -- classes --------------------------------------------------------------------------------------


class Hub:
    def push(self) -> str:
        return "pushed"


class Configured:
    config_name: str | None = None

    def config_of(self) -> str:
        return f"config of {type(self).__name__}"


class HubModule(nn.Module, Hub):
    """As in diffusers: the module is not the last of the bases."""

    def __getattr__(self, name: str) -> Any:
        internal = self.__dict__.get("_internal", {})
        return internal[name] if name in internal else super().__getattr__(name)


def test_bases_as_in_diffusers():
    class Adapters:
        adapted = False

    class UNet(HubModule, Configured, Adapters):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, dtype=torch.float64)
            self.__dict__["_internal"] = {"scale": 3.0}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scale

    engine = check(UNet)
    assert (engine.push(), engine.config_of(), engine.scale) == ("pushed", "config of UNet", 3.0)


def test_mixins_before_the_module_and_generic_and_abstract_ones():
    class Trained(abc.ABC):
        @abc.abstractmethod
        def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    class Model(Hub, Layer, Generic[T]):
        pass

    class Abstract(Layer, Trained):
        forward = Layer.forward

    assert check(Model).push() == "pushed"
    assert isinstance(check(Abstract), Trained)


def test_a_class_that_counts_its_subclasses():
    class Registered(nn.Module):
        known: ClassVar[list[Any]] = []

        def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            Registered.known.append((key, cls))

    class Model(Registered, key="model"):
        __init__ = Layer.__init__
        forward = Layer.forward

    def build() -> Any:
        model = Layer()
        model.__class__ = Model
        return model

    check(build)
    assert Registered.known == [("model", Model)]


def test_a_metaclass_that_allows_no_subclass():
    class Final(type):
        def __new__(mcs, name: str, bases: Any, members: Any) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("this class is final")
            return super().__new__(mcs, name, bases, members)

    class Model(Layer, metaclass=Final):
        pass

    check(Model)


def test_a_call_of_the_models_own():
    class Doubled(Layer):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().__call__(x)

    calls = []
    engine = check(Doubled)
    engine.register_forward_hook(lambda *_: calls.append(1))
    engine(X)
    assert len(calls) == 1  # not by the program and by the call


def test_slots_are_refused():
    class Slotted(Layer):
        __slots__ = ("extra",)

    engine, _ = auto_engine(Slotted(), None, "1", progress=None)
    with pytest.raises(CaptureError, match=r"keeps extra in __slots__.*leave __slots__ out"):
        engine(X)


def test_a_class_without_subclasses_is_explained():
    class Final(type):
        def mro(cls) -> list[type]:
            bases = super().mro()
            if any(isinstance(base, Final) for base in bases[1:]):
                raise TypeError("no consistent order of its bases")
            return bases

    class Model(Layer, metaclass=Final):
        pass

    with pytest.raises(EngineError, match=r"Python allows none: no consistent.* Wrap the model"):
        auto_engine(Model(), None, "1")


# -- names ----------------------------------------------------------------------------------------


class Named(Layer):
    """A model with the names of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 7
        self.memory_plan = nn.Identity()

    @property
    def plan(self) -> str:
        return "the model's"

    @staticmethod
    def plan_for() -> str:
        return "the model's"

    def no_sync(self) -> str:
        return "the model's"

    @classmethod
    def full_state_dict(cls) -> str:
        return f"that of {cls.__name__}"


def test_names_of_the_model_are_the_models():
    engine = check(Named)
    assert engine.steps == 7
    engine.steps = 8
    assert engine.steps == 8
    assert isinstance(engine.memory_plan, nn.Identity)
    assert engine.plan == engine.plan_for() == engine.no_sync() == "the model's"
    assert engine.full_state_dict() == "that of Named"


def test_names_of_the_engine_are_there_otherwise():
    engine = check(Layer)
    assert engine.plan.model == "Layer"
    assert len(engine.steps) == 1
    assert engine.memory_plan is None
    engine.plan_for(X)
    with engine.no_sync():
        engine(X)
    assert len(engine.steps) == 1


# -- whole state ----------------------------------------------------------------------------------


class Tied(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.layer
        self.register_buffer("count", torch.zeros(3, dtype=torch.float64))

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_full_state_dicts_are_plain_copies():
    engine = check(Tied)
    state = engine.full_state_dict()
    assert set(state) == set(Tied().state_dict())
    assert all(type(x) is torch.Tensor for x in state.values() if not isinstance(x, dict))
    assert state["layer.weight"] is state["again.weight"]
    before = state["layer.weight"].clone()
    with torch.no_grad():
        engine.layer.weight.add_(1)
        engine.count.add_(1)
    assert torch.equal(state["layer.weight"], before) and not state["count"].any()
    assert Tied().load_state_dict(state).missing_keys == []
    engine.load_full_state_dict(state)
    assert torch.equal(engine.layer.weight.full_tensor(), before)
    assert engine.extra == {"version": 1} and not engine.count.any()
    assert torch.equal(engine.full_state_dict()["layer.weight"], before)


def test_a_state_of_another_model_is_refused():
    engine = check(Layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.load_full_state_dict({**engine.full_state_dict(), "layer.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        engine.load_full_state_dict({"layer.bias": torch.zeros(8)})
    with pytest.raises(EngineError, match="pass it on rank 0"):
        engine.load_full_state_dict({})


# -- objects among the results --------------------------------------------------------------------


class Cache:
    """Holds tensors, and more of its kind."""

    def __init__(self, keys: torch.Tensor) -> None:
        raise AssertionError("a result is not made anew by its __init__")

    @classmethod
    def of(cls, keys: torch.Tensor, *layers: Any) -> Any:
        cache = object.__new__(cls)
        cache.keys, cache.layers, cache.dtype = keys, list(layers), keys.dtype
        return cache


class Returns(Layer):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.layer(x)
        return {"loss": h.sum(), "cache": Cache.of(h, Cache.of(2 * h)), "kinds": (h.dtype, Cache)}


def test_objects_and_constants_are_results():
    torch.manual_seed(0)
    model = Returns()
    expected = model(X)
    engine, _ = auto_engine(model, None, "1", progress=None)
    for given in (engine(X), engine(X)):
        cache = given["cache"]
        assert type(cache) is Cache and type(cache.layers[0]) is Cache
        assert cache.dtype is torch.float64 and given["kinds"] == (torch.float64, Cache)
        assert torch.equal(cache.keys, expected["cache"].keys)
        assert torch.equal(cache.layers[0].keys, expected["cache"].layers[0].keys)
        (gradient,) = torch.autograd.grad(cache.layers[0].keys.sum(), engine.layer.bias)
        assert torch.equal(gradient.full_tensor(), torch.full((8,), 8.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "result", [lambda h: {h.sum()}, lambda h: iter([h]), lambda h: nn.Linear(1, 1)]
)
def test_other_objects_are_refused(result):
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> Any:
            return result(self.layer(x))

    engine, _ = auto_engine(Model(), None, "1", progress=None)
    with pytest.raises(CaptureError, match=r"the model returns a \w+, .*return tensors"):
        engine(X)


def test_a_namespace_is_a_result():
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> Any:
            out = Cache.of(self.layer(x))
            out.more = SimpleNamespace
            return out

    engine, _ = auto_engine(Model(), None, "1", progress=None)
    assert engine(X).more is SimpleNamespace
