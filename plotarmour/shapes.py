"""From a recipe to its model: the one place that knows every kind of model."""

import torch
from torch import nn

from plotarmour.cli import UserError
from plotarmour.config import Recipe
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import GPT2, GPT2Config


def model_config(recipe: Recipe, vocab_size: int) -> BDHConfig | GPT2Config:
    """Return the shape of a recipe's model.

    Raises:
        UserError: an impossible shape.
    """
    try:
        if recipe.model == "bdh":
            return BDHConfig(vocab_size=vocab_size, **recipe.architecture)
        return GPT2Config(vocab_size=vocab_size, context_length=recipe.training.context_length, **recipe.architecture)
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe {recipe.name} ({recipe.model}): {error}.") from None


def build_model(recipe: Recipe, vocab_size: int) -> nn.Module:
    """Build the untrained model of a recipe; its weights follow from the recipe's seed alone."""
    config = model_config(recipe, vocab_size)
    torch.manual_seed(recipe.training.seed)
    return BDH(config) if recipe.model == "bdh" else GPT2(config)
