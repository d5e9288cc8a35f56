"""Every way to steer, made ready from the same pairs, so that they can be compared.

prepared          what an arm is given, and what it gives back
arms              the arms, by name
combine           two arms at once, and how their effects interact
"""

from saesteer.compare.prepared import Material, Prepared

__all__ = ["Material", "Prepared"]
