"""Log-ins, and the rights of those who are in.

`gate` guards every page: it asks one `Way` who a person is, `proxy`, `oidc` or `link`, and
refuses the rest. Without one everybody who reaches the address reads, and nobody acts. `forms`
reads what a page of ours has sent, and refuses what another one has.
"""
