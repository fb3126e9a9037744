"""Probes: each function and class of the user is called once before a run, in a child process with a time limit.

- kinds.py: the kinds of user code in a config
- process.py: the parent's side: starts the child, enforces the limits, collects the findings; imports no torch
- child.py: calls one module per kind: dataset.py, reward.py, reward_manager.py, algorithms.py, agent.py
- context.py: arguments and results of the probes, and which exceptions are errors; rows.py: sample rows of the data

A fault is an error if the run would certainly meet it: a signature that does not fit, a wrong type, a key that the data
does not have. Other exceptions of user code are warnings, because they may depend on the sample, or on a service that
does not run yet.
"""
