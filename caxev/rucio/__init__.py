"""The catalogue of replicas: Rucio.

`names` has what a run's data is called in it, `rules` reads rule files, `changes` decides which
replicas are wanted, `files` has what a file must be; these are pure or read this disk alone.
`client` has what can be done, in worker processes, with the values of `orders`; `moving` brings
files there and back. Only `connection` and `storage` know Rucio's library.
`caxev.handlers.rucio` and ``caxev rucio`` put them together.
"""
