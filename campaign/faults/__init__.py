"""Faults in real runs: `python -m campaign.faults`; docs/reliability.md has the rule and the last result.

- catalog.py: the faults, and what has to follow each; inject/: carries out those inside of processes
- run.py: a run that gets faults, and the checks after each of them and at its end
- schedule.py: the faults of each run; results.py: the counts and the table
"""
