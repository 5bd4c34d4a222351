"""Tests for authors of handlers: reactions run by the real engine on a real database.

::

    from caxev.testing import Lab, lab
    from my_reactions import count_copies

    @lab(count_copies, sites=2)
    async def test_copies_are_counted(lab: Lab) -> None:
        run = await lab.new_run(files={"a.zip": b"abc"}, tags=["count_me"])
        await lab.settle()
        assert (await lab.look(run)).document["good_copies"] == 1

``async with lab(count_copies) as here:`` is the same without a test. No plugin is needed: pytest
sees an ordinary test, whose other arguments are fixtures as usual.

- `Lab`: the sites, their directories, and functions that make something happen;
- `serving`: one listener, in this process or (to be killed) in one of its own.

Requires the extra ``embedded``, or your own replica set in ``CAXEV_LAB_MONGO_URI``; each lab
creates a database there, and drops it.
"""

from caxev.testing.lab import Lab, Opening, lab

__all__ = ["Lab", "Opening", "lab"]
