"""For authors of handlers: one's reactions, run by the real engine on a real database.

::

    from caxev.testing import Lab, lab
    from my_reactions import count_copies

    @lab(count_copies, sites=2)
    async def test_copies_are_counted(lab: Lab) -> None:
        run = await lab.new_run(files={"a.zip": b"abc"}, tags=["count_me"])
        await lab.settle()
        assert (await lab.look(run)).document["good_copies"] == 1

``async with lab(count_copies) as here:`` is the same without a test. No plugin is needed: pytest
sees an ordinary test, whose other arguments are fixtures as always.

- `Lab`: the sites, their directories, and what happens there;
- `serving`: one listener, in this process or (to be killed) in one of its own.

Needs the extra ``embedded``, or a replica set of one's own that ``CAXEV_LAB_MONGO_URI`` names; each
lab has a database of its own there, and drops it.
"""

from caxev.testing.lab import Lab, Opening, lab

__all__ = ["Lab", "Opening", "lab"]
