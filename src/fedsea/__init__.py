"""fedsea: fine-tune and use one large language model together without sharing data.

The names below are what most programs need; each is imported when it is first used, so that `import fedsea` costs
nothing. Everything that the `fedsea` command does is one of these calls. Type checkers read `__init__.pyi`: imports
for them in this file would make every module that asks for `__version__` depend on the whole house.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "ClientOptions": "fedsea.client.options",
    "FederationPlan": "fedsea.plan",
    "FedseaError": "fedsea.errors",
    "Partition": "fedsea.types",
    "ServerOptions": "fedsea.server.run",
    "SplitCausalLM": "fedsea.client.causal_lm",
    "evaluate": "fedsea.client.results",
    "export": "fedsea.client.results:export_adapter",
    "load_input_blocks": "fedsea.model.loading",
    "load_output_blocks": "fedsea.model.loading",
    "load_plan": "fedsea.plan",
    "load_trunk": "fedsea.model.loading",
    "open_checkpoint": "fedsea.model.checkpoint",
    "serve": "fedsea.server.run",
    "train": "fedsea.client.run",
    "train_alone": "fedsea.client.run",
}

__all__ = [
    "ClientOptions",
    "FederationPlan",
    "FedseaError",
    "Partition",
    "ServerOptions",
    "SplitCausalLM",
    "__version__",
    "evaluate",
    "export",
    "load_input_blocks",
    "load_output_blocks",
    "load_plan",
    "load_trunk",
    "open_checkpoint",
    "serve",
    "train",
    "train_alone",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsea' has no attribute {name!r}")
    module, _, other_name = _HOMES[name].partition(":")
    value: object = getattr(import_module(module), other_name or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
