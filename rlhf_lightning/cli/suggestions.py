"""Which override Hydra could not take, and the real setting that was probably meant."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_PATH = "pkg://rlhf_lightning.conf"
BY_A_PLUS = "Arguments of lightning.Trainer that no config shows are added by a plus: +trainer.limit_train_batches=10"
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises where a command line makes no config; the last for a group that is null."""


def explain(error: Exception, verb: str, flags: Sequence[str], overrides: Sequence[str]) -> str:
    """Return a message for a config that does not compose: the override to blame and the nearest real name.

    Overrides are added one by one until composition fails; Hydra's own words stand in where that finds nothing.
    """
    try:
        return _blame(verb, flags, overrides) or _in_hydras_words(error)
    except NOT_COMPOSED:
        return _in_hydras_words(error)


def _in_hydras_words(error: BaseException) -> str:
    return str(error).strip()


def _blame(verb: str, flags: Sequence[str], overrides: Sequence[str]) -> str | None:
    loader, config_name = _loader(verb, flags)
    parser = OverridesParser.create(config_loader=loader)
    parsed = [parser.parse_override(override) for override in overrides]
    # Choices of groups come first: which settings exist depends on them.
    parsed.sort(key=lambda override: not _is_group(loader, override))
    kept: list[str] = []
    for override in parsed:
        try:
            _compose(loader, config_name, [*kept, str(override.input_line)])
        except NOT_COMPOSED as error:
            config = _compose(loader, config_name, kept)
            return _message(verb, loader, config, override) or _in_hydras_words(error)
        kept.append(str(override.input_line))
    return None


def _loader(verb: str, flags: Sequence[str]) -> tuple[ConfigLoaderImpl, str]:
    """Return a loader with the search path of the command line, and the name of its root config."""
    args = get_args_parser().parse_args(list(flags))
    path = create_automatic_config_search_path(None, "rlhf_lightning.cli", args.config_path or CONFIG_PATH)
    if args.config_dir is not None:
        path.prepend("command-line", f"file://{args.config_dir}", anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(path), args.config_name or verb


def _compose(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> DictConfig:
    return loader.load_configuration(
        config_name, list(overrides), run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False
    )


def _is_group(loader: ConfigLoaderImpl, override: Override) -> bool:
    return "." not in override.key_or_group and override.key_or_group.split("/")[0] in loader.list_groups("")


def _message(verb: str, loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> str | None:
    if _is_group(loader, override):
        options = loader.get_group_options(override.key_or_group, ObjectType.CONFIG)
        if override.value() in options:
            return None
        return (
            f"{override.key_or_group}={override.value()} is not an option"
            f"{did_you_mean(str(override.value()), options, override.key_or_group + '=')}"
            f" (there are: {', '.join(options)})"
        )
    keys = [key for key in flat_keys(config) if not key.startswith("hydra.")]
    if override.key_or_group in keys:
        return None
    elsewhere = _elsewhere(verb, loader, config, override)
    if elsewhere is not None:
        return elsewhere
    near = did_you_mean(override.key_or_group, [*keys, *loader.list_groups("")])
    said = f"{override.key_or_group} is not a setting of `rlhf {verb}`{near}"
    return f"{said}{'' if near else '.'} {BY_A_PLUS}" if override.key_or_group.startswith("trainer.") else said


def _elsewhere(verb: str, loader: ConfigLoaderImpl, config: DictConfig, override: Override) -> str | None:
    """Return which other option of the setting's group, or of the module that data and callbacks follow, has it."""
    key, chosen = override.key_or_group, config.hydra.runtime.choices
    for group in dict.fromkeys(("module", key.split(".")[0])):
        if group not in chosen:
            continue
        others = [option for option in loader.get_group_options(group, ObjectType.CONFIG) if option != chosen[group]]
        having = [f"{group}={option}" for option in others if key in flat_keys(_alone(loader, verb, group, option))]
        if having:
            return f"{key} is a setting of {' or '.join(having)}; this run has {group}={chosen[group]}"
    return None


def _alone(loader: ConfigLoaderImpl, verb: str, group: str, option: str) -> DictConfig:
    """Return the root config with one other choice."""
    return _compose(loader, verb, [f"{group}={option}"])


def did_you_mean(name: str, candidates: Sequence[str], prefix: str = "") -> str:
    """Return "; did you mean X?" with the nearest candidate, an empty text where none is near."""
    nearest = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def flat_keys(config: DictConfig) -> list[str]:
    """Return every key of the config, those of inner nodes too, as it is written in an override."""
    return list(_flat_keys(OmegaConf.to_container(config), ""))


def _flat_keys(node: object, prefix: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        yield f"{prefix}{key}"
        yield from _flat_keys(value, f"{prefix}{key}.")
