"""Named methods: rows of sparsifier x consensus, with the papers' usual numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A method. `density` and `scale` are what it takes if nothing is said."""

    sparsifier: str
    consensus: str
    density: float = 1.0
    scale: float = 1.0
    numbers: dict[str, float] = field(default_factory=dict)
    paper: str = ""


PRESETS: dict[str, Preset] = {
    "average": Preset("none", "mean", paper="2203.05482"),
    "task-arithmetic": Preset("none", "sum", paper="2212.04089"),
    "ties": Preset("magnitude", "ties", 0.2, paper="2306.01708"),
    "dare": Preset("dare", "sum", 0.5, paper="2311.03099"),
    "dare-ties": Preset("dare", "ties", 0.5, paper="2311.03099"),
    "della": Preset("della", "ties", 0.5, numbers={"epsilon": 0.1}, paper="2406.11617"),
    "della-linear": Preset("della", "sum", 0.5, numbers={"epsilon": 0.1}, paper="2406.11617"),
    "breadcrumbs": Preset("breadcrumbs", "sum", 0.9, numbers={"gamma": 0.01}, paper="2312.06795"),
    "breadcrumbs-ties": Preset(
        "breadcrumbs", "ties", 0.9, numbers={"gamma": 0.01}, paper="2312.06795"
    ),
    "impart": Preset("impart", "sum", 0.5, paper="2504.13237"),
    "impart-ties": Preset("impart", "ties", 0.5, paper="2504.13237"),
    "slerp": Preset("none", "slerp"),
    "consensus": Preset("none", "consensus", paper="2405.07813"),
}
