"""What makes a feature the answer to a query: a small pure function with named weights.

Two kinds of evidence are joined. `text` is the BM25 of the query in the feature's searchable text;
it finds features by label, context and promoted tokens, but can't tell a feature that is about
boats from one whose examples have a boat in them. `aboutness` is of what the feature does on the
query's own word, over the whole text that was indexed.
"""

# BM25 weights of the fields of `records.FIELDS`: a label was made to be found; words carry the
# firing; neighbours of the firing word say what it is about; promoted tokens say what it does;
# the rest of an example only happens to be there. They are multiples of .5 (see `frequent`).
FIELD_WEIGHTS = {"label": 8.0, "words": 6.0, "near": 2.0, "promotes": 2.0, "contexts": 0.5}

# The four figures below were chosen on two SAEs of the planted language (precision@1 over every
# word of a concept), where they are flat to within a point by a factor of 2 either way.
#
# What the text that matches counts against firing on the query's word (which gives 0 to 6).
TEXT_WEIGHT = 0.2
# Lift at which a feature counts as half specific, beyond 1: one that fires on a fifth of all
# tokens has a lift of 5 at the most and is about a part of speech, not a word.
HALF_LIFT = 2.0
# A feature that fires on four of five occurrences misses the fifth for a reason: it is about
# something else that goes with the word.
RECALL = 2
# Share of the activation mass at which a word counts as half of what the feature is about: a
# concept of a dozen words spends some 8% on each, and should hardly lose by that against a
# feature for the one word.
HALF_SHARE = 0.003
# Of features that fire alike on the word, those for more words of one kind win. How many words a
# feature has says little by itself, since a mixture of unrelated words has many too; words that
# fire within one example keep company, and those of a mixture don't. A feature of FULL_BREADTH
# words counts (1 + BREADTH_WEIGHT) times, one with FULL_COMPANY to an example
# (1 + COMPANY_WEIGHT) times.
BREADTH_WEIGHT, FULL_BREADTH = 0.5, 16.0
COMPANY_WEIGHT, FULL_COMPANY = 4.0, 3.0
# What a user wrote about a feature comes before all that is measured; a label that a model wrote
# counts like firing on nothing but the word.
NOTE_WEIGHT, WRITTEN_WEIGHT = 10.0, 1.0
# Breadth and company can raise a score so many times.
MOST_RAISED = (1 + BREADTH_WEIGHT) * (1 + COMPANY_WEIGHT)


def rank(
    text: float,
    about: float,
    breadth: float,
    company: float,
    *,
    note: float = 0.0,
    written: float = 0.0,
) -> float:
    """Score of a feature for a query; higher is better, 0 is nothing.

    Args:
        text: BM25 against the best candidate's, 0 to 1.
        about: mean `aboutness` over the words of the query, 0 for one on which it doesn't fire.
        breadth: effective number of the feature's own words.
        company: how many of them fire within one example, on average.
        note, written: BM25 of what a user, or a model, wrote about the feature, against the best
            candidate's, 0 to 1.
    """
    broad = 1 + BREADTH_WEIGHT * min(breadth, FULL_BREADTH) / FULL_BREADTH
    together = 1 + COMPANY_WEIGHT * min(company, FULL_COMPANY) / FULL_COMPANY
    measured = about * broad * together + TEXT_WEIGHT * text
    return measured + NOTE_WEIGHT * note + WRITTEN_WEIGHT * written


def aboutness(share: float, lift: float, recall: float) -> float:
    """How much a feature is about a word, 0 to 1: it fires on most of its occurrences, on little
    else by chance, and spends a fair share of its activation there.

    Args:
        share: of its activation mass.
        lift: how many times likelier the word is where it fires.
        recall: on what share of the word's occurrences it fires.
    """
    excess = max(0.0, lift - 1)
    specific = excess / (excess + HALF_LIFT)
    spent = share / (share + HALF_SHARE)
    return recall**RECALL * specific * spent
