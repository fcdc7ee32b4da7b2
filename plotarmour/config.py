"""Recipes: TOML files, read into frozen dataclasses and checked.

A recipe is one file in `plotarmour/recipes/`:

    [data]             the text and how it is tokenized
    [training]         settings that all models share
    [bdh], [gpt2], ... the architectures
    [bdh.training]     settings of this architecture alone, such as its learning rate

`--set key=value` overrides a key of `[data]`, `[training]` or the architecture; key names are unique across them.
"""

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plotarmour.cli import UserError, as_path, warn
from plotarmour.models import KINDS, LanguageModel, ModelConfig, architecture_fields, build_model, model_config

RECIPES = Path(__file__).parent / "recipes"
AUTO = "auto"  # the value of a setting that the program is to choose
Auto = Literal["auto"]
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
LARGEST = 2**53  # of whole numbers: exact as a float
Rule = tuple[str, Callable[[Any], bool]]  # the words of a message, and the test; every test is false for NaN
AT_LEAST_1: Rule = ("must be at least 1", lambda value: value >= 1)
POSITIVE: Rule = ("must be positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Rule = ("must not be negative or infinite", lambda value: 0 <= value < math.inf)
FRACTION: Rule = ("must be in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1: Rule = ("must be in [0, 1)", lambda value: 0 <= value < 1)
SEED: Rule = ("must be in [0, 2**32)", lambda value: 0 <= value < 2**32)


def _one_of(*allowed: str) -> Rule:
    """Return the rule of a setting that has a few possible values."""
    return f"must be one of {', '.join(allowed)}", lambda value: value in allowed


def _field(doc: str, default: Any = dataclasses.MISSING, rule: Rule | None = None, *, identity: bool = True,
           arm: bool | None = None, extendable: bool = False,
           used_if: tuple[str, Callable[[Any], bool]] | None = None) -> Any:
    """Declare a field of a config dataclass: a sentence with the unit, the default, and the rule of possible values.

    The flags concern training settings only. `identity`: the value decides what a run learns, so a run continues only
    with the same value. `arm`: runs of one arm have the same value; by default as `identity`. `extendable`: `--extend`
    may change the value. `used_if`: words and a test of the section; where it is false, the setting has no effect.
    """
    return dataclasses.field(default=default, metadata={
        "doc": doc, "rule": rule, "identity": identity, "arm": identity if arm is None else arm,
        "extendable": extendable, "used_if": used_if})


HAS_CORPUS = ("corpus_stories is above 0", lambda data: data.corpus_stories > 0)


@dataclass(frozen=True)
class DataConfig:
    """Where stories come from and how they become tokens. The hashes of the token files identify a run, not these."""

    tokenizer: str = _field("The tokenizer: gpt2, bytes, or bpe:N or words:N, which learn N entries.")
    stories: str = _field("What makes a story: endoftext, line, line_without_prefix (what follows its first tab), "
                          "paragraph or file.", "endoftext",
                          _one_of("endoftext", "line", "line_without_prefix", "paragraph", "file"))
    split: str = _field("Shares of train, val and test.", "90:5:5")
    corpus_stories: int = _field("Stories of the built-in corpus; 0: the user brings a text.", 0, NOT_NEGATIVE)
    corpus_seed: int = _field("Seed of the built-in corpus.", 0, SEED, used_if=HAS_CORPUS)
    corpus_min_events: int = _field("Fewest events of a story; each adds about 14 tokens to 62.", 2, NOT_NEGATIVE,
                                    used_if=HAS_CORPUS)
    corpus_max_events: int = _field("Most events of a story.", 4, NOT_NEGATIVE, used_if=HAS_CORPUS)


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of the training loop. A step is one attempted optimizer update."""

    context_length: int = _field("Tokens per row.", rule=AT_LEAST_1)
    rows_per_step: int = _field("Rows that one step learns from.", rule=AT_LEAST_1)
    micro_batch_size: int | Auto = _field('Rows per forward pass; "auto": the most that fit into memory.',
                                          rule=AT_LEAST_1, identity=False)
    max_steps: int = _field("Steps until training ends.", rule=AT_LEAST_1, extendable=True)
    learning_rate: float = _field("The highest learning rate, reached after warm-up.", rule=POSITIVE)
    windows: str = _field("How the token file is cut into rows: stream (without gaps), stories (whole ones in order), "
                          "packed (whole ones that fit together), left_pad, slide_through or full (each place of a "
                          "story ends or begins a row).", "stream",
                          _one_of("stream", "stories", "packed", "left_pad", "slide_through", "full"))
    mask_stories: bool = _field("Whether a token sees only its own story where a row holds several, or padding before "
                                "it.", False,
                                used_if=("windows is stream, stories, packed or left_pad",
                                         lambda t: t.windows not in ("slide_through", "full")))
    seed: int = _field("Seed of weights, dropout and the order of rows.", 0, SEED, arm=False)
    schedule: str = _field("The learning rate after warm-up: cosine, or linear_tail (constant, then linear).",
                           "cosine", _one_of("cosine", "linear_tail"))
    warmup_steps: int = _field("Steps in which the learning rate rises linearly from 0.", 100, NOT_NEGATIVE)
    final_learning_rate_fraction: float = _field("The last learning rate, as a fraction of learning_rate.", 0.1,
                                                 FRACTION)
    decay_fraction: float = _field("Fraction of the schedule over which the linear tail falls.", 0.35, FRACTION,
                                   used_if=('schedule is "linear_tail"', lambda t: t.schedule == "linear_tail"))
    schedule_minutes: float = _field("Minutes, summed over all sessions, after which the schedule ends if max_steps "
                                     "does not end it earlier; 0: no such limit.", 0.0, NOT_NEGATIVE, extendable=True)
    optimizer: str = _field("adamw, or muon: torch's Muon for the core matrices, and AdamW for the other parameters.",
                            "adamw", _one_of("adamw", "muon"))
    keep_norm: bool = _field("Whether an update leaves the norm of each core parameter matrix as it was.", False)
    embedding_rate_fraction: float = _field("Learning rate of embeddings, of tokens and positions, as a multiple of "
                                            "learning_rate.", 1.0, POSITIVE)
    head_rate_fraction: float = _field("Learning rate of the head, as a multiple of learning_rate; a tied head learns "
                                       "as the embeddings.", 1.0, POSITIVE)
    weight_decay: float = _field("Weight decay, on matrices only.", 0.1, NOT_NEGATIVE)
    beta1: float = _field("AdamW's decay rate of the mean of gradients, per step.", 0.9, BELOW_1)
    beta2: float = _field("AdamW's decay rate of the mean of squared gradients, per step.", 0.95, BELOW_1)
    grad_clip: float = _field("The largest gradient norm; larger gradients are scaled down. 0: no clipping.", 1.0,
                              NOT_NEGATIVE)
    log_interval: int = _field("Steps per row of log.csv.", 10, AT_LEAST_1, identity=False)
    eval_interval: int = _field("Steps between two evaluations.", 100, AT_LEAST_1)
    eval_tokens: int = _field("Tokens of the validation file per evaluation, always the same ones.", 20_000, AT_LEAST_1)
    patience: int = _field("Evaluations without improvement before training stops early; 0: it never does.", 0,
                           NOT_NEGATIVE, extendable=True)
    checkpoint_interval: int = _field("Steps between two checkpoints.", 200, AT_LEAST_1, identity=False)
    keep_every: int = _field("Steps between two checkpoints that are kept for good; 0: only the best and the last two "
                             "are kept.", 0, NOT_NEGATIVE, identity=False)
    max_minutes: float | Auto = _field('Minutes after which a session stops with a checkpoint; 0: no limit; "auto": '
                                       "Kaggle's limits on Kaggle, no limit elsewhere.", AUTO, NOT_NEGATIVE,
                                       identity=False)
    dtype: str = _field("Number format of the forward pass: auto, float32, bfloat16 or float16.", "auto",
                        _one_of("auto", "float32", "bfloat16", "float16"), arm=False)
    device: str = _field("Where to compute: auto, cpu or cuda.", "auto", _one_of("auto", "cpu", "cuda"), identity=False)

    @property
    def micro_batch_rows(self) -> int:
        """Rows per forward pass as a number: those of a whole step for "auto", the most it can choose."""
        return self.rows_per_step if self.micro_batch_size == AUTO else self.micro_batch_size

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes per step."""
        return self.rows_per_step // self.micro_batch_rows

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step at most: all windows but "stream" pad some rows."""
        return self.rows_per_step * self.context_length


def largest_divisor(rows: int, at_most: int) -> int:
    """Return the largest number, `at_most` or smaller, that divides `rows`. (12, 5): micro-batches of 4 rows."""
    return next(n for n in range(min(rows, at_most), 0, -1) if rows % n == 0)


def training_settings(flag: str) -> tuple[str, ...]:
    """Return the training settings that are "identity", "arm" or "extendable"."""
    return tuple(field.name for field in dataclasses.fields(TrainingConfig) if field.metadata[flag])


@dataclass(frozen=True)
class Recipe:
    """The part of a recipe that one model uses, with overrides applied."""

    name: str  # of the file, without .toml
    model: str  # a key of `plotarmour.models.KINDS`
    data: DataConfig
    training: TrainingConfig
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of the kind's config class
    overridden: tuple[str, ...] = ()  # keys that the user has overridden

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the config of this recipe's model. Raise `UserError` for an impossible shape."""
        try:
            return model_config(self.model, self.architecture, vocab_size, self.training.context_length)
        except ValueError as error:
            raise UserError(f"recipe {self.name} ({self.model}): {error}.") from None

    def build_model(self, vocab_size: int) -> LanguageModel:
        """Build this recipe's untrained model from its seed. Raise `UserError` where that is impossible."""
        config = self.model_config(vocab_size)
        try:
            return build_model(self.model, config, self.training.seed)
        except ValueError as error:  # a class that the installed `transformers` lacks
            raise UserError(f"recipe {self.name} ({self.model}): {error}.") from None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str, model: str, overrides: Collection[str] = ()) -> Recipe:
    """Read a recipe for one model. Warn of settings that have no effect.

    Args:
        name: of a file in `plotarmour/recipes/`, without .toml, or the path of a TOML file.
        model: a key of `plotarmour.models.KINDS`.
        overrides: "key=value" each.

    Raises:
        UserError: an unknown recipe or model, or wrong keys and values, all in one message.
    """
    path = as_path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"unknown recipe {name!r}{_closest(name, recipe_names())}; expected one of "
                        f"{', '.join(recipe_names())}, or the path of a .toml file.")
    if model not in KINDS:
        raise UserError(f"unknown model {model!r}{_closest(model, KINDS)}; expected one of {', '.join(KINDS)}.")
    sections = _read_sections(path, model)
    overridden, wrong = _override(sections, _known(model), overrides)
    recipe = _checked(path.stem, model, sections, overridden, wrong)
    _warn_unused(recipe)
    return recipe


def restored(stored: dict) -> Recipe:
    """Return the recipe that run.json holds. Raise an error if it is not as `dataclasses.asdict` gave it."""
    sections = {"data": stored["data"], "training": stored["training"], stored["model"]: stored["architecture"]}
    return _checked(stored["name"], stored["model"], sections, stored["overridden"], [])


def warn_ignored(recipe: Recipe, keys: Collection[str], why: str) -> None:
    """Warn of each of `keys` that the user has overridden: it has no effect, for the reason `why`."""
    for key in (key for key in recipe.overridden if key in keys):
        warn(f"{key} is ignored: {why}.")


def _read_sections(path: Path, model: str) -> dict[str, dict[str, Any]]:
    """Return the sections [data], [training] and [MODEL] of a recipe file for one model."""
    known = ("data", "training", *KINDS)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits and brackets in brackets
        raise UserError(f"{path} is not TOML: {error}.") from None
    wrong = [f"the section [{section}] is missing" for section in ("data", "training", model)
             if not isinstance(table.get(section), dict)]
    if not wrong and not isinstance(table[model].get("training", {}), dict):
        wrong.append(f"training in [{model}] is not a section")
    wrong += [f"unknown section or key {key!r}{_closest(key, known)}" for key in table if key not in known]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}; expected keys in the sections {', '.join(known)} only.")
    table["training"] |= table[model].pop("training", {})
    return {section: table[section] for section in ("data", "training", model)}


def _override(sections: dict, known: dict, overrides: Collection[str]) -> tuple[list[str], list[str]]:
    """Set overrides in `sections`; return the overridden keys, and complaints."""
    overridden, wrong = [], []
    section_of = {key: section for section, fields in known.items() for key in fields}
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))  # a=1; b=2 in a notebook
        if not equals or key not in section_of:
            keys = _closest(key, section_of) or f"; keys are {', '.join(sorted(section_of))}"
            wrong.append(f"--set {' '.join(override.split())}: expected key=value with a known key{keys}")
            continue
        section = section_of[key]
        kind = _kind(known[section][key])[0]
        with suppress(ValueError, KeyError):  # a text in place of a number: `_check_values` complains
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        sections[section][key] = value
        overridden.append(key)
    return overridden, wrong


def _known(model: str) -> dict[str, dict[str, dataclasses.Field]]:
    """Return the keys of the sections [data], [training] and [MODEL]."""
    return {"data": DataConfig.__dataclass_fields__, "training": TrainingConfig.__dataclass_fields__,
            model: architecture_fields(model)}


def _checked(name: str, model: str, sections: dict, overridden: list[str], wrong: list[str]) -> Recipe:
    """Return a recipe of its sections. Raise `UserError` with `wrong` and all other complaints."""
    complaints = {section: _check_values(section, sections[section], known) for section, known in _known(model).items()}
    if not complaints[model]:
        try:
            model_config(model, sections[model], vocab_size=1, context_length=1)
        except ValueError as error:
            complaints[model].append(str(error))
    wrong = sum(complaints.values(), wrong)
    if not wrong:
        recipe = Recipe(name, model, DataConfig(**sections["data"]), TrainingConfig(**sections["training"]),
                        sections[model], tuple(overridden))
        wrong = _check_together(recipe)
    if wrong:
        raise UserError(f"recipe {name} ({model}): {'; '.join(wrong)}.")
    return recipe


def _check_values(section: str, values: dict[str, Any], known: dict[str, dataclasses.Field]) -> list[str]:
    """Return complaints about keys and about values one by one; make whole numbers floats where expected."""
    wrong = []
    for key, value in values.items():
        if key not in known:
            wrong.append(f"unknown key {key!r} in [{section}]{_closest(key, known)}")
            continue
        (kind, may_be_auto), rule = _kind(known[key]), known[key].metadata.get("rule")
        if kind is float and type(value) is int:
            value = values[key] = float(value) if abs(value) <= LARGEST else math.inf
        if may_be_auto and value == AUTO:
            continue
        if type(value) is not kind:
            wrong.append(f"{key} = {value!r} is not {TYPE_NAMES[kind]}" + (' or "auto"' if may_be_auto else ""))
        elif (kind is int and value > LARGEST) or (kind is str and "\0" in value):
            wrong.append(f"{key} = {value!r} {'is too large' if kind is int else 'holds a NUL'}")
        elif rule and not rule[1](value):
            wrong.append(f"{key} = {value!r} {rule[0]}")
    return wrong + [f"{key} is missing in [{section}]" for key, field in known.items()
                    if field.default is dataclasses.MISSING and key not in values]


def _check_together(recipe: Recipe) -> list[str]:
    """Return complaints about values that are impossible together."""
    d, t = recipe.data, recipe.training
    rules = (
        (t.rows_per_step <= 2**20, f"rows_per_step = {t.rows_per_step} must be at most 2**20"),
        (t.warmup_steps < t.max_steps,
         f"warmup_steps = {t.warmup_steps} must be less than max_steps = {t.max_steps}"),
        (d.corpus_min_events <= d.corpus_max_events,
         f"corpus_min_events = {d.corpus_min_events} must not exceed corpus_max_events = {d.corpus_max_events}"),
        (t.rows_per_step % t.micro_batch_rows == 0,
         f"rows_per_step = {t.rows_per_step} is not a multiple of micro_batch_size = {t.micro_batch_rows}: set "
         f'micro_batch_size to {largest_divisor(t.rows_per_step, t.micro_batch_rows)} or to "auto"'))
    return [message for is_possible, message in rules if not is_possible]


def _warn_unused(recipe: Recipe) -> None:
    """Warn of settings without effect that the user has overridden, or the recipe sets to another than the default."""
    for config in (recipe.data, recipe.training):
        for key, field in config.__dataclass_fields__.items():
            is_set = key in recipe.overridden or getattr(config, key) != field.default
            if (used_if := field.metadata["used_if"]) and is_set and not used_if[1](config):
                warn(f"{key} is ignored: it has an effect only where {used_if[0]}.")


def _kind(field: dataclasses.Field) -> tuple[type, bool]:
    """Split the annotation of a field, such as `int | Auto`, into its type, and whether "auto" is possible."""
    kinds = typing.get_args(field.type) or (field.type,)
    return kinds[0], len(kinds) > 1


def _closest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
