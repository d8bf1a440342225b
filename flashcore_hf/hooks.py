"""What a switch puts on a model for `generate()`, and the error where a Transformers no longer calls it.

`use_flashcore_cache` and `graphed` set attributes on the model object that stand in for methods of its class. The day a
release renames such a method, or what it calls the cache, nothing would call them, and the switch would do nothing
without a word. So `generate` has a stand-in too: it notes what was reached meanwhile, and raises where one was not.
"""

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import NamedTuple

import torch

from . import compat  # first: it says so where Transformers is too old

compat.require_cache_layers()

from transformers import GenerationMixin  # noqa: E402
from transformers.cache_utils import Cache, DynamicCache  # noqa: E402

PREPARE = "_prepare_cache_for_generation"


class Switch(NamedTuple):
    """A line that a user wrote, and what `generate()` must reach for it to work.

    Attributes:
        off: the line that takes it back.
        needs: methods of the model.
    """

    off: str
    needs: tuple[str, ...]


# In the order in which they change a new cache.
SWITCHES = {
    "cache": Switch("flashcore_hf.use_flashcore_cache(model, False)", (PREPARE,)),
    "graphs": Switch("flashcore_hf.graphed(model, False)", (PREPARE, "forward")),
}


class Run:
    """One call of `generate()` that is under way: the methods of `model` that it reached, the cache that we gave it."""

    def __init__(self, model):
        self.model = model
        self.reached: set[str] = set()
        self.cache = None


# generate() may call itself, or that of another model.
_runs: ContextVar[tuple[Run, ...]] = ContextVar("flashcore_runs", default=())


def reached(model, name: str) -> None:
    """Note that generate(), where it is what runs, got to what stands in for the model's method `name`."""
    for run in _runs.get():
        if run.model is model:
            run.reached.add(name)


def owner(model):
    """The object whose methods `generate()` calls: the model itself, or the one inside a wrapper such as PEFT's.

    Raises:
        ValueError: there is no generate(), or one that makes its cache in a way of its own.
        RuntimeError: Transformers has nothing of the name that we stand in for.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"a model with Transformers' generate() is needed, and {type(model).__name__} has none")
    prepare = getattr(model, PREPARE, None)
    if prepare is None:
        raise RuntimeError(
            f"{type(model).__name__} has no method {PREPARE}, where flashcore gives generate() its cache: it is not in "
            f"Transformers {compat.transformers.__version__}, and flashcore was tested up to {compat.NEWEST_TESTED}"
        )
    if "model_kwargs" not in inspect.signature(prepare).parameters:
        raise ValueError(
            f"{type(model).__name__} makes the cache of generate() in a way of its own, which flashcore cannot change; "
            "it runs with attn_implementation='flashcore' and its own cache"
        )
    return prepare.model if isinstance(prepare, StandIn) else getattr(prepare, "__self__", model)


def on_new_cache(model, name: str, change: Callable | None) -> None:
    """Have `change(cache, batch_size)` answer the cache that generate() goes on with, when it has made one.

    Args:
        model: an `owner`.
        name: one of SWITCHES. A `change` of None takes it away, and with the last one every trace of them.
    """
    if change is not None:
        prepare = StandIn.on(model, PREPARE, PrepareCache)
        prepare.changes[name] = change
        StandIn.on(model, "generate", Generate).switches = prepare.changes
        return
    prepare = vars(model).get(PREPARE)
    if isinstance(prepare, PrepareCache):
        prepare.changes.pop(name, None)
        if not prepare.changes:
            prepare.remove()
            generate = vars(model).get("generate")
            if isinstance(generate, Generate):
                generate.remove()


def did_not_hold(model, switches: Iterable[str], what: str) -> RuntimeError:
    """The error that says so."""
    off = " and ".join(SWITCHES[name].off for name in switches)
    return RuntimeError(
        f"{off.replace('(model, False)', '(model)')} did not take hold: {what} (a {type(model).__name__} of "
        f"Transformers {compat.transformers.__version__}; flashcore was tested up to {compat.NEWEST_TESTED}). {off} "
        "takes it back, and generate() then runs as it always does. Where it is a model inside this one that "
        "generates, call it on that one"
    )


class StandIn:
    """An attribute on a model object in place of a method of its class. Copied and pickled with the model."""

    def __init__(self, model, name: str):
        self.model = model
        self.name = name
        self.before = vars(model).get(name)  # what stood on the object itself, which its class does not know

    @classmethod
    def on(cls, model, name: str, kind: type["StandIn"]) -> "StandIn":
        """The one that is on the model, or a new one."""
        there = vars(model).get(name)
        if not isinstance(there, kind):
            there = kind(model, name)
            setattr(model, name, there)
        return there

    def remove(self) -> None:
        """Put back what was there."""
        delattr(self.model, self.name)
        if self.before is not None:
            setattr(self.model, self.name, self.before)

    @property
    def original(self) -> Callable:
        """What this stands in for."""
        return getattr(type(self.model), self.name).__get__(self.model) if self.before is None else self.before

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)


class Generate(StandIn):
    """`generate`, and a look at what it has reached."""

    switches: Iterable[str] = ()

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        run = Run(self.model)
        token = _runs.set((*_runs.get(), run))
        try:
            answer = self.original(*args, **kwargs)
        finally:
            _runs.reset(token)
        # A loop of the caller's own, continuous batching, and Janus's images have caches of their own.
        own_way = (
            kwargs.get("custom_generate") is not None
            or kwargs.get("cache_implementation") == "paged"
            or kwargs.get("generation_mode") == "image"
        )
        if not own_way:
            self.check(run)
        return answer

    def check(self, run: Run) -> None:
        """Raise where a switch did not take hold."""
        for name in self.switches:
            for method in SWITCHES[name].needs:
                if method not in run.reached:
                    raise did_not_hold(self.model, [name], f"generate() did not call {method} of this object")
        if run.cache is not None and run.cache.unused and _fills_its_cache(self.model):
            raise did_not_hold(self.model, self.switches, "the model's forward did not use the cache that it was given")


class PrepareCache(StandIn):
    """`_prepare_cache_for_generation`: Transformers decides, then `changes` have their turn."""

    def __init__(self, model, name: str):
        super().__init__(model, name)
        self.changes: dict[str, Callable] = {}

    def __call__(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs):
        model = self.model
        reached(model, self.name)
        users_own = caches(model_kwargs) or any(model_kwargs.get(name) is not None for name in compat.CACHE_NAMES)
        cache_asked_for = generation_config.cache_implementation is not None
        answer = self.original(generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs)
        theirs_stays = model.config.is_encoder_decoder and not compat.CHANGES_ENCODER_DECODERS
        if users_own or generation_config.use_cache is False or theirs_stays:
            return answer
        made = model_kwargs.get(compat.CACHE_NAME)
        if made is None and not cache_asked_for and model._supports_default_dynamic_cache():
            made = self.missing_cache(caches(model_kwargs))
        if made is not None:
            batch_size *= max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            cache = made
            for name in SWITCHES:
                if name in self.changes:
                    cache = self.changes[name](cache, batch_size)
            model_kwargs[compat.CACHE_NAME] = cache
            if cache is not made and _runs.get():
                _runs.get()[-1].cache = cache
        return answer

    def missing_cache(self, elsewhere: list[str]) -> DynamicCache | None:
        """The cache that generate() should have made and did not, or put `elsewhere`, which may be right all the same.

        Raises:
            RuntimeError: nothing explains it.
        """
        model = self.model
        if "cache_params" in elsewhere:
            return None  # Mamba's up to 5.23: no layer of it is attention
        if elsewhere:
            raise did_not_hold(
                model,
                self.changes,
                f"generate() calls its cache {elsewhere[0]!r}, and {compat.CACHE_NAME!r} was expected",
            )
        if compat.FORWARD_MAKES_CACHE:
            return DynamicCache(config=model.config.get_text_config(decoder=True))
        if getattr(type(model), self.name) is getattr(GenerationMixin, self.name, None):
            raise did_not_hold(model, self.changes, f"{self.name} of GenerationMixin made no cache")
        return None


def caches(arguments: dict) -> list[str]:
    """Names of the arguments that are caches."""
    return [name for name, value in arguments.items() if isinstance(value, Cache)]


def _fills_its_cache(model) -> bool:
    """Whether a forward with a cache leaves tokens in it."""
    takes = inspect.signature(type(model).forward).parameters
    if not any(name in takes for name in compat.CACHE_NAMES):
        return False
    if "encoder_hidden_states" in takes and not getattr(model.config, "is_decoder", False):
        return False  # BERT and its kind, of which only decoders keep one
    return not (model.training and getattr(model, "is_gradient_checkpointing", False))
