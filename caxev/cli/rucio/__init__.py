"""Run ``caxev rucio``: compare, move and delete data of the Rucio catalogue.

`put` and `get` write requests that the sites' listeners fulfil; `rules` checks a rule file,
explains it, and has listeners apply it; `check` compares the database with the catalogue both ways;
`locate` lists the database's entries; `rm` deletes a dataset, `purge` copies on disk that the
catalogue has, both after a proof; `forget` removes an entry only.
"""

from caxev.cli.rucio import bring, look, remove, rules
from caxev.cli.rucio.chosen import rucio

__all__ = ["bring", "look", "remove", "rucio", "rules"]
