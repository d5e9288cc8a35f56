"""The planted language: stories whose every next word has a known probability.

A story draws a hidden set of concepts; the concepts decide which words fill its content slots.
Since the whole process is written down here, the right answer to "what should the model say if
this concept were on?" is a number, not an opinion: see `saesteer.world.exact`.

    lexicon   the concepts and their words
    grammar   the sentences: which slot or fixed word may come next
    exact     the Bayes predictor p*, and p* under do(concept)
    corpus    stories, contrast pairs, prompts and the planted failures, by seed
    train     the small language model that is bundled in `saesteer/world/lm`
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "lm"
