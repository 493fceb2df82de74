"""Training a whole model against a teacher: text in rows, one loop, one or several processes.

Knows nothing of what is trained: any student that gives logits and names its parameters will do.
"""

from deltafold.training.loop import Settings, State, exam, train
from deltafold.training.masters import Masters
from deltafold.training.memory import forward_tokens
from deltafold.training.processes import Processes
from deltafold.training.rows import Rows, pack
from deltafold.training.watch import Watch

__all__ = [
    "Masters",
    "Processes",
    "Rows",
    "Settings",
    "State",
    "Watch",
    "exam",
    "forward_tokens",
    "pack",
    "train",
]
