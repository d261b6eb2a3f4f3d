"""`zo-dist plan`: memory, traffic and seconds per step of a model on a cluster, before anything is rented.

All of it is computed from shapes. `formulas.py` holds what is computed, `sharding.py` what engines gather,
`meta.py` one forward without values, `hardware.py` and `shapes.py` the tables. docs/planning.md explains.
"""
