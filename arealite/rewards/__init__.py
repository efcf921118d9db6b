"""Reward functions, and the pool of killable processes in which they run.

Importing any of this is light: no torch, no engine. Worker processes count on that.
"""
