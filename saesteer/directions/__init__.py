"""Directions fitted on contrast pairs, one file a method.

pairs             reading and writing contrast pairs
answers           the activations of both answers of each pair
mean_difference   the mean over pairs of act(chosen) − act(rejected)
"""

from saesteer.directions.direction import Direction

__all__ = ["Direction"]
