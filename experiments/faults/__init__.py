"""Campaigns that hurt a run of training and show that it ends as if none had.

Each module is a script: a seeded schedule, one JSON line with counts and a digest, exit
code 1 when a promise of docs/reliability.md is broken.
"""
