"""Recipes (TOML) to frozen dataclasses, checked: all complaints at once.

A recipe is one file in `plotarmour/recipes/`:

    [data]             what text, how tokenized
    [training]         shared by both models
    [bdh], [gpt2]      the two architectures
    [bdh.training]     what this architecture sets for itself, such as its learning rate

`--set key=value` overrides a key of `[data]`, `[training]` or the architecture; key names are unique across them.

How the rows of a step are split is said in one of three ways, and always kept as `micro_batch_size` times
`grad_accum_steps`: by these two; by the first and `rows_per_step`; or by `micro_batch_size = "auto"`, the most rows
that fit into memory, and `rows_per_step` (without it, as many as the recipe's own split has).
"""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plotarmour.cli import UserError
from plotarmour.models import KINDS, LanguageModel, ModelConfig, build_model, model_config

RECIPES = Path(__file__).parent / "recipes"
AUTO = -1.0  # max_minutes = "auto"


@dataclass(frozen=True)
class DataConfig:
    """Where stories come from and how they become tokens."""

    tokenizer: str  # gpt2, bpe:N or bytes
    stories: str = "endoftext"  # what makes a story: endoftext, line or file
    split: str = "90:5:5"  # shares of train, val and test
    corpus_stories: int = 0  # stories of the built-in corpus; 0: the user brings a text
    corpus_seed: int = 0
    corpus_min_events: int = 2  # about 14 tokens each on top of 62
    corpus_max_events: int = 4


@dataclass(frozen=True)
class TrainingConfig:
    """Everything the training loop decides by. Lengths in tokens, intervals in steps (optimizer updates)."""

    context_length: int
    micro_batch_size: int  # rows per forward pass; "auto": the most that fit
    grad_accum_steps: int  # forward passes per step
    max_steps: int
    learning_rate: float
    windows: str = "stream"  # how the token file is cut into rows: stream or stories
    seed: int = 0
    schedule: str = "cosine"  # after warm-up: cosine, or constant with a linear decay over the last decay_fraction
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.1  # of learning_rate, at the end of the schedule
    decay_fraction: float = 0.35  # of the schedule's length, for schedule = "linear_tail"
    schedule_minutes: float = 0.0  # the schedule ends after this long, all sessions together, or at max_steps; 0: there
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    log_interval: int = 10
    eval_interval: int = 100
    eval_tokens: int = 20_000  # of the validation file, always the same ones
    patience: int = 0  # evaluations without improvement before early stopping; 0: never stop early
    checkpoint_interval: int = 200
    keep_every: int = 0  # also keep every n-th step's checkpoint; 0: only latest, the one before, and best
    max_minutes: float = AUTO  # stop with a checkpoint after this long; 0: no limit; "auto": Kaggle's limits, there
    dtype: str = "auto"  # auto, float32, bfloat16 or float16
    device: str = "auto"  # auto, cpu, cuda
    micro_batch_is_auto: bool = False  # micro_batch_size was "auto": split the rows further until they fit

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        """At most; windows = "stories" pads some rows."""
        return self.rows_per_step * self.context_length


@dataclass(frozen=True)
class Recipe:
    """One model's share of a recipe, resolved."""

    name: str
    model: str
    data: DataConfig
    training: TrainingConfig
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of the kind's config class

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the config of this recipe's model.

        Raises:
            UserError: an impossible shape.
        """
        try:
            return model_config(self.model, self.architecture, vocab_size, self.training.context_length)
        except ValueError as error:
            raise UserError(f"recipe {self.name} ({self.model}): {error}.") from None

    def build_model(self, vocab_size: int) -> LanguageModel:
        """Build this recipe's untrained model; its weights follow from the recipe's seed alone.

        Raises:
            UserError: an impossible shape.
        """
        self.model_config(vocab_size)
        t = self.training
        return build_model(self.model, self.architecture, vocab_size, t.context_length, t.seed)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str, model: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe for one model.

    Args:
        name: of a file in `plotarmour/recipes/`, without .toml, or the path of a TOML file.
        model: a key of `plotarmour.models.KINDS`.
        overrides: "key=value" each.

    Raises:
        UserError: unknown recipe, model or key, a value of the wrong type, settings that contradict each other.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"unknown recipe {name!r}{_closest(name, recipe_names())}; expected one of "
                        f"{', '.join(recipe_names())}, or the path of a .toml file.")
    if model not in KINDS:
        raise UserError(f"unknown model {model!r}{_closest(model, KINDS)}; expected one of {', '.join(KINDS)}.")
    known_sections = ("data", "training", *KINDS)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}.") from None
    wrong = [f"the section [{section}] is missing" for section in ("data", "training", model)
             if not isinstance(table.get(section), dict)]
    wrong += [f"unknown section or key {key!r}{_closest(key, known_sections)}" for key in table
              if key not in known_sections]
    if not wrong and not isinstance(table[model].get("training", {}), dict):
        wrong.append(f"{model}.training is no section")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}; expected keys in the sections {', '.join(known_sections)} only.")
    architecture = dict(table[model])
    own = architecture.pop("training", {})
    sections = {"data": dict(table["data"]), "training": table["training"] | own, "architecture": architecture}
    known = {"data": _types(DataConfig), "training": _types(TrainingConfig) | {"rows_per_step": int},
             "architecture": {key: float if key == "dropout" else type(value) for key, value in architecture.items()}}
    del known["training"]["micro_batch_is_auto"]
    complaints, chosen = [], set()
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))  # a=1; b=2 in a notebook
        section = next((s for s in known if key in known[s]), None)
        if not equals or section is None:
            keys = [k for s in known.values() for k in s]
            near = _closest(key, keys)
            complaints.append(f"--set {override.strip()}: "
                              + (f"unknown key {key!r}{near}" if equals else "expected key=value")
                              + ("" if near and equals else f"; keys are {', '.join(sorted(keys))}"))
            continue
        sections[section][key] = _parse(value, known[section][key])
        chosen.add(key)
    auto = sections["training"].get("micro_batch_size") == "auto"
    unsplit = _resolve(sections["training"], table["training"] | own, chosen)
    for section, values in sections.items():
        for key, value in values.items():
            if key not in known[section]:
                complaints.append(f"unknown key {key!r} in [{section}]{_closest(key, known[section])}")
            elif not _fits(value, known[section][key]):
                also = ' or "auto"' if key in ("micro_batch_size", "max_minutes") else ""
                expected = _TYPE_NAMES.get(known[section][key], "a number or text")
                complaints.append(f"{key} = {value!r} is not {expected}{also}")
    for kind, section in ((DataConfig, "data"), (TrainingConfig, "training")):
        needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        complaints += [f"{key} is missing in [{section}]" for key in sorted(needed - set(sections[section]))]
    if not complaints:
        sections["training"] = {key: float(value) if known["training"][key] is float else value
                                for key, value in sections["training"].items()}
        sections["training"]["micro_batch_is_auto"] = auto
        recipe = Recipe(path.stem, model, DataConfig(**sections["data"]), TrainingConfig(**sections["training"]),
                        architecture | sections["architecture"])
        complaints = _complaints(recipe)
    complaints = unsplit + complaints
    if complaints:
        raise UserError(f"recipe {path.stem} ({model}): " + "; ".join(complaints) + ".")
    return recipe


def _resolve(training: dict, before: dict, chosen: set[str]) -> list[str]:
    """Replace rows_per_step and each "auto" by numbers; return what is wrong with them.

    Args:
        training: settings with overrides, changed in place.
        before: settings without overrides.
        chosen: keys that were overridden.
    """
    minutes, wrong = training.get("max_minutes"), []
    if minutes == "auto":
        training["max_minutes"] = AUTO
    elif _fits(minutes, float) and minutes < 0:  # here, because AUTO is below zero, too
        wrong.append(f'max_minutes = {minutes:g} must be "auto" or not negative')
    return wrong + _resolve_rows(training, before, chosen)


def _resolve_rows(training: dict, before: dict, chosen: set[str]) -> list[str]:
    rows, auto = training.pop("rows_per_step", None), training.get("micro_batch_size") == "auto"
    if rows is None and not auto:
        return []
    stated = chosen if "rows_per_step" not in before else chosen | set(before)
    accum = training.get("grad_accum_steps") if "grad_accum_steps" in stated else None
    if rows is None:
        split = before.get("micro_batch_size"), before.get("grad_accum_steps")
        if not all(_fits(n, int) for n in split):
            training.update(micro_batch_size=1, grad_accum_steps=1)
            return ['micro_batch_size = "auto" needs rows_per_step: set it to the rows of a step']
        rows = split[0] * split[1]
    training.setdefault("grad_accum_steps", 1)  # it follows: no reason to complain that it is missing
    if auto:
        training.update(micro_batch_size=1, grad_accum_steps=1)  # until the rows are known to be a number
    if not _fits(rows, int) or rows < 1:
        return [f"rows_per_step = {rows!r} must be a whole number of at least 1"]
    size = rows if auto else training.get("micro_batch_size")
    if not _fits(size, int) or size < 1:
        return []  # which is complained of elsewhere
    if rows % size:
        below = next(n for n in range(min(size, rows), 0, -1) if rows % n == 0)
        return [f"rows_per_step = {rows} is no multiple of micro_batch_size = {size}: set the latter to {below}, or to "
                '"auto"']
    if accum is not None and (auto or accum != rows // size):
        return [f"grad_accum_steps = {accum!r} does not fit rows_per_step = {rows} in micro-batches of "
                f"{'any size' if auto else size}: leave it out, it follows"]
    training.update(micro_batch_size=size, grad_accum_steps=rows // size)
    return []


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text"}


def _types(kind: type) -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(kind)}


def _closest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _parse(value: str, kind: type) -> Any:
    for convert in ((int,) if kind is int else (float,) if kind is float else ()):
        try:
            return convert(value)
        except ValueError:
            pass
    return value


def _fits(value: Any, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _complaints(recipe: Recipe) -> list[str]:
    d, t, wrong = recipe.data, recipe.training, []

    def need(fine: bool, rule: str) -> None:
        if not fine:
            wrong.append(rule)

    for key in ("context_length", "micro_batch_size", "grad_accum_steps", "max_steps", "log_interval",
                "eval_interval", "eval_tokens", "checkpoint_interval"):
        need(getattr(t, key) >= 1, f"{key} = {getattr(t, key)} must be at least 1")
    for key, value in (("seed", t.seed), ("corpus_seed", d.corpus_seed)):
        need(0 <= value < 2**32, f"{key} = {value} must be in [0, 2**32)")
    for key in ("warmup_steps", "patience", "keep_every", "schedule_minutes", "weight_decay", "grad_clip"):
        need(getattr(t, key) >= 0, f"{key} = {getattr(t, key)} must not be negative")
    for key in ("beta1", "beta2"):
        need(0 <= getattr(t, key) < 1, f"{key} = {getattr(t, key)} must be in [0, 1)")
    for key in ("final_learning_rate_fraction", "decay_fraction"):
        need(0 <= getattr(t, key) <= 1, f"{key} = {getattr(t, key)} must be in [0, 1]")
    need(t.learning_rate > 0, f"learning_rate = {t.learning_rate} must be positive")
    need(t.warmup_steps < t.max_steps or t.max_steps < 1,
         f"warmup_steps = {t.warmup_steps} must be less than max_steps = {t.max_steps}")
    for key, allowed in (("windows", ("stream", "stories")), ("schedule", ("cosine", "linear_tail")),
                         ("dtype", ("auto", "float32", "bfloat16", "float16")), ("device", ("auto", "cpu", "cuda"))):
        need(getattr(t, key) in allowed, f"{key} = {getattr(t, key)!r} must be one of {', '.join(allowed)}")
    need(d.corpus_stories >= 0, f"corpus_stories = {d.corpus_stories} must not be negative")
    need(0 <= d.corpus_min_events <= d.corpus_max_events,
         f"corpus_min_events = {d.corpus_min_events} must be between 0 and corpus_max_events = {d.corpus_max_events}")
    for key, value in recipe.architecture.items():
        need(not isinstance(value, int) or value >= 1 or key == "dropout", f"{key} = {value} must be at least 1")
        need(key != "dropout" or 0 <= value < 1, f"{key} = {value} must be in [0, 1)")
    for key, value in vars(t).items():
        told = any(rule.startswith(f"{key} = ") for rule in wrong)  # nan is neither positive nor in [0, 1)
        need(told or not isinstance(value, float) or math.isfinite(value), f"{key} = {value} must be finite")
    return wrong
