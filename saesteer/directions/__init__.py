"""Directions fitted on contrast pairs, one file a method.

pairs, pair_*     reading and writing contrast pairs, checking them, making new ones
margin            how much likelier the chosen answer is
answers           the activations of both answers of each pair
places            which tokens of a pair are read
answer_cache      what was read, kept on disk
direction, kept   what a method makes, how it is meant to be used, and its file
methods           every method by name, with its paper
fitting           any method on pairs, at any number of hook points
sides, rows, heads  what the methods share
…                 the methods, one file each
"""

from saesteer.directions.direction import Direction

__all__ = ["Direction"]
