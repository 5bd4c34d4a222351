"""Acts that people request, by the command line or the page.

A person asks for something by an *act*: a frozen value, such as ``TagRuns("good")`` or
``HoldCopies("lngs", DataChoice("raw"), Keep(days=14))``. An act is made without the database, and
its method `steps` decides about one run, without I/O: it returns the write to make, with its row of
history, or the reason why there is none. `Asker` (in `asker`) plans acts and carries them out for a
person; nothing here prints, parses options or asks for a confirmation::

    asker = Asker(database, sites, registry, by="shifter@desk")     # `registry`: by a site's name
    plan = await asker.plan(act, selection)                         # counts, bytes, refusals
    async with aclosing(asker.carry_out(act, plan.runs)) as steps:  # the act itself
        async for step in steps:
            ...                                                     # step.state, step.ok

    step = await asker.carry_out_one(act, run.id)                   # about one run: raises if a
                                                                    # rule forbids it

What is asked of several runs is kept as one request, which has an id and can be followed, cancelled
and resumed (in `requests`)::

    request = await requests.keep(asker, act, plan.runs)
    async with aclosing(requests.carry_out(asker, request)) as steps: ...
    progress = await requests.progress(asker, request)
    await requests.cancel(asker, request)

- `base`: acts, steps, plans, and the facts on which acts decide;
- `annotations`: tags and comments; `holding`: holds, and their ends. These are done when they are
  written;
- `copies`, `deletions`, `readings`, `archives`, `catalogues`: what listeners do later, to copies;
- `listeners`: retry, replay, and the end of an alarm: what listeners are asked for themselves;
- `vouching`: which copy is right.

Errors: `NothingToDo` (and `Ambiguous`) of `caxev.core.errors`, naming the rule that forbids it;
`ConfigError`; `DatabaseError`.
"""
