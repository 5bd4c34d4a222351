"""``caxev rucio``: data in the catalogue, as the database and Rucio have it.

`put` and `get` write requests that the sites' listeners fulfil; `rules` checks a rule file,
explains what it means, and has listeners apply it; `check` compares the database with the catalogue
both ways; `locate` lists what the database knows; `rm` gives a dataset up, and `purge` copies on
disk that the catalogue has, on proof; `forget` drops an entry only.
"""

from caxev.cli.rucio import bring, look, remove, rules
from caxev.cli.rucio.chosen import rucio

__all__ = ["bring", "look", "remove", "rucio", "rules"]
