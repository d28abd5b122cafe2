"""One short file for each task: config, data, model, loss, figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from seqkern.train.checkpoint import CheckpointError
from seqkern.train.config import Training, from_state
from seqkern.train.recipes._recipe import Recipe
from seqkern.train.recipes.char_lm import CharLM, CharLMConfig
from seqkern.train.recipes.elmo import Elmo, ElmoConfig
from seqkern.train.recipes.names import NamesConfig, names
from seqkern.train.recipes.questions import Questions, QuestionsConfig
from seqkern.train.recipes.sentiment import Sentiment, SentimentConfig
from seqkern.train.recipes.tagger import Tagger, TaggerConfig
from seqkern.train.recipes.translate import Translate, TranslateConfig
from seqkern.train.recipes.word_lm import WordLM, WordLMConfig
from seqkern.train.recipes.word_vectors import Vectors, WordVectorsConfig

__all__ = ["RECIPES", "Entry", "Recipe", "restore"]


class Entry(NamedTuple):
    """What `train` needs to begin: the options, the recipe made of them, and a line about it."""

    config: type[Training]
    make: Callable[[Any], Recipe]
    help: str


RECIPES = {
    "char-lm": Entry(CharLMConfig, CharLM, "character-level language model"),
    "word-lm": Entry(WordLMConfig, WordLM, "word-level language model"),
    "word-vectors": Entry(WordVectorsConfig, Vectors, "word vectors: CBOW, skip-gram"),
    "elmo": Entry(ElmoConfig, Elmo, "contextual word vectors: a language model in both directions"),
    "sentiment": Entry(SentimentConfig, Sentiment, "sentiment of reviews: IMDB, SST-2"),
    "names": Entry(NamesConfig, names, "languages of names: classify, generate"),
    "questions": Entry(QuestionsConfig, Questions, "what questions ask for: TREC"),
    "tagger": Entry(TaggerConfig, Tagger, "named entities and parts of speech"),
    "translate": Entry(TranslateConfig, Translate, "translation"),
}


def restore(state: dict[str, Any]) -> Recipe:
    """The recipe of a checkpoint, with its trained model in eval mode.

    Raises:   CheckpointError: no recipe's checkpoint, or one of another version
    """
    entry = RECIPES.get(state.get("recipe", ""))
    if entry is None or "model" not in state:
        raise CheckpointError(
            f"checkpoint: expected one of the recipes {', '.join(RECIPES)}, got {state.get('recipe')!r}"
        )
    try:
        recipe = entry.make(from_state(entry.config, state["config"]))
        recipe.restore(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: not of this version of {state['recipe']}: {error}") from error
    return recipe
