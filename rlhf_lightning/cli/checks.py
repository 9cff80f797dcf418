"""What Hydra does not check: that every setting of a `_target_` exists, is there, and has the type that it asks for."""

import gc
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union

from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError, check_seed

Config = dict[str, Any]

WHAT_TO_PASS = {
    "network.pretrained": "a Hugging Face folder or hub name",
    "data.path": "a .jsonl file",
    "module.reward": "a reward-model folder or hub name, or file.py:function",
    "reward": "a reward-model folder or hub name, or file.py:function",
}

HYDRAS_OWN = {"_target_", "_args_", "_convert_", "_partial_", "_recursive_"}


def plain(config: DictConfig) -> Config:
    """Return the config as plain containers, interpolations resolved; raises `InputError` where a value is missing."""
    try:
        # A missing value counts where it is written, not again wherever an interpolation leads to it.
        found = leaves(OmegaConf.to_container(config, resolve=False), "")
        missing = sorted(path for path, value in found if value == "???")
        if missing:
            raise InputError("\n".join(_missing(key) for key in missing))
        return typing.cast(Config, OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise InputError(f"{where}the config cannot be resolved: {str(error).splitlines()[0]}") from error


def check(config: Config, *, known: Sequence[str]) -> None:
    """Compare every node that has a `_target_` with what it calls, before anything slow is built.

    ``known`` are the root keys of the verb. Raises `InputError` for a setting that does not exist, also one added with
    ``+``, for one that is required and not there, and for a value of the wrong basic type.
    """
    for key in config:
        near = did_you_mean(key, known)
        if key not in known and near:
            raise InputError(f"{key} is not a setting{near}")
    _check_data_root(config)
    if "seed" in config:
        check_seed("seed", config["seed"])
    for path, node in target_nodes(config, ""):
        _check_node(path, node)


def check_strategy(module: Config, trainer: Config) -> None:
    """Raise `InputError` where the stage of a module cannot run under the strategy of its Trainer."""
    from rlhf_lightning.preflight import check_ppo_strategy

    strategy = trainer["strategy"]
    if is_ppo(module):
        check_ppo_strategy(strategy["_target_"] if isinstance(strategy, dict) else strategy)


def is_ppo(module: Config) -> bool:
    """Return whether the node of a module names `PPOModule` or a class made from it."""
    kind = target("module", module["_target_"])
    return inspect.isclass(kind) and any(base.__name__ == "PPOModule" for base in kind.__mro__)


def target_nodes(node: object, path: str) -> Iterator[tuple[str, Config]]:
    """Yield every node with a `_target_` and its place in the config."""
    children: Mapping[Any, Any] = {}
    if isinstance(node, dict):
        children = node
        if "_target_" in node:
            yield path, node
    elif isinstance(node, list):
        children = dict(enumerate(node))
    for key, child in children.items():
        yield from target_nodes(child, f"{path}.{key}" if path else str(key))


def target(path: str, name: str) -> Callable[..., Any]:
    """Return what ``name`` means; raises `InputError` where it cannot be imported."""
    try:
        # Not hydra.utils.get_object, which logs the error as well.
        with _without_collecting():
            found = _locate(name)
    except Exception as error:
        raise InputError(f"{path}._target_={name} cannot be imported: {_last_line(error)}") from error
    if not callable(found):
        raise InputError(f"{path}._target_={name} is neither a class nor a function")
    return typing.cast(Callable[..., Any], found)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Look for no garbage while modules are imported: what they make stays, and each look goes through all of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_reward_function(path: str, node: Config) -> bool:
    """Return whether the node is a reward and names a plain function, which is to be kept and not to be called.

    A reward is what stands at ``reward``, or in ``rewards`` as one of several.
    """
    *_, outer, last = ["", *path.split(".")]
    return (last == "reward" or outer == "rewards") and inspect.isfunction(target(path, node["_target_"]))


def _check_data_root(config: Config) -> None:
    if "data_root" not in config or Path(config["data_root"]).exists():
        return
    for path, value in leaves(config, ""):
        if isinstance(value, str) and value.startswith(f"{config['data_root']}/"):
            raise InputError(
                f"data_root={config['data_root']} does not exist, and {path} lies in it: pass data_root=FOLDER, or set "
                "the environment variable RLHF_LIGHTNING_DATA"
            )


def leaves(node: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield every value that is no container, and its place in the config."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield path, node
        return
    for key, child in children:
        yield from leaves(child, f"{path}.{key}".lstrip("."))


def _missing(key: str) -> str:
    what = f" ({WHAT_TO_PASS[key]})" if key in WHAT_TO_PASS else ""
    return f"{key} is required{what}: pass {key}=VALUE"


def _check_node(path: str, node: Config) -> None:
    called = target(path, node["_target_"])
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):  # built in C: nothing is known about its arguments
        return
    settings = {key: value for key, value in node.items() if key not in HYDRAS_OWN}
    _check_names(path, node, settings, parameters)
    annotations = _annotations(called)
    for key, value in settings.items():
        if key in parameters and key in annotations and not fits(value, annotations[key]):
            raise InputError(f"{path}.{key} must be {_spelled(annotations[key])}, not {value!r}")


def _check_names(path: str, node: Config, settings: Config, parameters: Mapping[str, inspect.Parameter]) -> None:
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for key in settings:
        if key not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
            near = did_you_mean(f"{path}.{key}", [f"{path}.{name}" for name in named])
            raise InputError(f"{path}.{key} is not a setting of {node['_target_']}{near}")
    if "_args_" in node or "_partial_" in node or is_reward_function(path, node):
        return
    for name in named:
        if parameters[name].default is inspect.Parameter.empty and name not in settings:
            raise InputError(_missing(f"{path}.{name}"))


def _annotations(called: Callable[..., Any]) -> dict[str, Any]:
    """Return what can be known of the annotations; names that exist for type checkers only are left out."""
    function: Any = inspect.unwrap(called.__init__ if inspect.isclass(called) else called)
    known: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(function).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            known |= typing.get_type_hints(alone, globalns=function.__globals__)
        except NameError:
            continue
    return known


def fits(value: object, annotation: Any) -> bool:
    """Return whether a value of a config can be what the annotation says; what is not a basic type is not judged."""
    options = _options(annotation)
    return any(_fits_one(value, option) for option in options)


def _options(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in _options(part)]
    return [annotation]


def _fits_one(value: object, option: Any) -> bool:
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option)
    if option is None or option is type(None):
        return value is None
    if option is bool:
        return isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is str or option is Path:
        return isinstance(value, str)
    if _is_kind(option, Mapping):
        return isinstance(value, dict)
    if _is_kind(option, Sequence):
        return isinstance(value, list)
    # An object of a class: a node with a `_target_` makes it, or the class makes it from a text or a list by itself.
    is_class = inspect.isclass(typing.get_origin(option) or option) and option not in (Any, object)
    return isinstance(value, dict | list | str) or not is_class


def _is_kind(option: Any, kind: type) -> bool:
    bare = typing.get_origin(option) or option
    return inspect.isclass(bare) and issubclass(bare, kind)


def _spelled(annotation: Any) -> str:
    names = [_spelled_one(option) for option in _options(annotation)]
    return " or ".join(dict.fromkeys(names))


def _spelled_one(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(option))
    if option is type(None):
        return "null"
    plain_words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if option in plain_words:
        return plain_words[option]
    return f"a {option.__name__}" if inspect.isclass(option) else str(option)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
