"""`checkpointer demo`: a story on private servers, in which things break and nothing is lost.

Told by `story.py`, scene by scene (`scenes.py`), on a *stage* (`stage.py`): two private servers, the console, agents
with a *fake model* that needs no network (`agents.py`), and faults (`faults.py`, `workers.py`). What happens becomes
*lines* (`narration.py`), for a terminal or for a test. All that a saver acknowledges is *noted* (`acknowledged.py`),
and at the end looked up in Postgres with LangGraph's own saver (`proof.py`). Not here: the command (`cli_demo.py`).
"""
