"""`python -m benchmarks`: measures LangGraph checkpoint savers in one run, interleaved, and says how ours stands.

Words: a *contender* is a saver in one configuration (`contenders.py`), a *lane* one that is open and takes turns with
the others (`lab.py`). A *load* is one kind of work that lanes do (`loads/`). A *measure* is what one contender showed
at one load and one point of it, such as a state size (`measure.py`). A *target* is what a ratio of two measures should
be (`targets.py`). `servers.py` and `network.py` give the servers and slow the way to them; `report.py` and `plots.py`
say and draw what was found. Not here: anything that a test asserts, since no test depends on speed.
"""
