"""The page: all sites and runs, live, in a browser. `caxev.cli.web` starts it.

A change walks from `caxev.database.feed` through `feeder` into the `state`, which is pure, and from
there as rendered parts of the page through the `hub` to every browser that shows them:

- `state`: what is known now, made of `runs` (copies by host, the latest changes, links, `growth`)
  and the ledger's open reactions; `lights` and `reasons` are what people conclude from it;
- `feeder`: fills the state by one pass, then follows the change stream; `documents` reads runs;
- `scene`: the state with the sites of sites.json, and what is in progress; `terminal` is all that
  ``caxev top`` adds;
- `views`: what each view shows, as parts, with a module for each of the larger ones: `now`,
  `links`, `storage`, `site`, `run` (with `jobs`); `rendering` makes HTML of them,
  `drawing` SVG;
- `answers`: what only the database knows, counted in the background;
- `broadcast`, `hub`: send each part that changed to all that watch its view, rendered once;
- `app`: the addresses; `api`, `data`: the same as JSON; `export`: runs as CSV; `guard`, `auth`:
  who may ask for what; `server`: Hypercorn, in our own nursery, and sites.json again.

It reads, and writes nothing: what a person asks for is done by functions of the command line, which
are handed in.
"""
