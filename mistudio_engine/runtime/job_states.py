"""The states of a job and what may follow what; nothing else changes a state.

         ┌────────────── resume ───────────────┐
         ▼                                     │
      queued ──▶ running ──▶ pausing ──▶ paused or interrupted
         ▲          │           │
       retry        ▼           ▼
         └── completed · failed · cancelled

It does not know who changes a state, nor where it is kept.
"""

from __future__ import annotations

from typing import Literal, get_args

from mistudio_engine.api.errors import Conflict
from mistudio_engine.api.records import Job, JobState

__all__ = ["ACTIVE_STATES", "TRANSITIONS", "Action", "check_action"]

Action = Literal["cancel", "pause", "resume", "stop", "retry"]
"""What a person or an agent can tell a job."""

ACTIVE_STATES = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.PAUSING})
"""States that end by themselves; in every other one a job rests until somebody acts."""

TRANSITIONS: dict[str, frozenset[str]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED, JobState.FAILED}),
    JobState.RUNNING: frozenset(
        {
            JobState.PAUSING,
            JobState.PAUSED,  # the disk is full
            JobState.INTERRUPTED,
            JobState.QUEUED,  # a passing fault: it is tried again
            JobState.COMPLETED,
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.PAUSING: frozenset(
        {
            JobState.PAUSED,
            JobState.RUNNING,  # resumed before it had paused
            JobState.INTERRUPTED,
            JobState.COMPLETED,  # that was its last step
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    # To paused when it was interrupted while pausing; to failed when its operation no longer exists.
    JobState.INTERRUPTED: frozenset({JobState.QUEUED, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""From each state, the states that may follow."""

POSSIBLE: dict[str, dict[str, bool]] = {
    # state: action → True when there is something to do, False when it is so already
    JobState.QUEUED: {"cancel": True, "pause": True, "resume": False},
    JobState.RUNNING: {"cancel": True, "pause": True, "stop": True, "resume": False},
    JobState.PAUSING: {"cancel": True, "pause": False, "resume": True},
    JobState.PAUSED: {"cancel": True, "pause": False, "resume": True, "retry": True},
    JobState.INTERRUPTED: {"cancel": True, "resume": True, "retry": True},
    JobState.COMPLETED: {"stop": False},
    JobState.FAILED: {"retry": True},
    JobState.CANCELLED: {"cancel": False, "retry": True},
}


def check_action(job: Job, action: str) -> bool:
    """Is there anything to do for `action`? False when the job is already as it asks; raises Conflict otherwise."""
    possible = POSSIBLE[job.state]
    if action in possible and not (action == "pause" and job.state == JobState.RUNNING and job.resumes == "never"):
        return possible[action]
    choices = [each for each in get_args(Action) if possible.get(each) and each != action]
    why = "It cannot go on later, so it cannot be paused." if action in possible else ""
    fix = f"Possible now: {', '.join(choices)}." if choices else "Make the call again for a new job."
    raise Conflict(f"{job.ref} is {job.state} and cannot be told to {action}.", why=why, fix=fix)
