"""What is asked of a reward model, and how its answers are counted: one file a suite, listed in `registry`.

A suite is a module with `HUB` (where its data lie on the hub, None where nowhere), `COLUMNS` (of its records),
`parse(record) -> Item`, `figures(answers) -> dict[str, float]` and `subsets(answers) -> dict[str, dict]`.
"""
