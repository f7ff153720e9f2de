"""The sections in which TensorBoard and the trackers show a run's metrics.

They show a section for each first part of a name, in alphabetical order: what one looks at first is first.
"""

import fnmatch

LEARNING = "1_learning"  # whatever has no section of its own
SECTIONS = {
    "2_held_out": ("held_out_*",),
    "3_norms": ("*_norm", "*_norm/*", "grad_norm_ratio", "bad_steps*"),
    "4_schedule": ("learning_rate/*", "ema_decay"),
    "5_data": ("documents*", "*_documents", "pad_fraction", "slot_occupancy", "predicted_share", "read_share"),
    "6_speed": ("*_per_s", "*_ms", "*_s", "mfu", "*_mfu", "memory_*", "slowest_process", "storage_retries"),
}


def tag(metric: str) -> str:
    """A metric's name with its section.

    >>> tag("loss"), tag("grad_norm/vision")
    ('1_learning/loss', '3_norms/grad_norm/vision')
    """
    found = (name for name, patterns in SECTIONS.items() if any(fnmatch.fnmatch(metric, each) for each in patterns))
    return f"{next(found, LEARNING)}/{metric}"
