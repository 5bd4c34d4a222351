"""Acts that an operator starts from the page: those of `caxev.asking`, as forms.

An act is offered (`offers`), shown as a plan with the command that does the same (`doing`,
`command_line`), and done when its form is sent (`pages`). Nothing is done by GET, and nothing that
was not shown: `caxev.web.auth.forms` and the plan's digest see to that.
"""
