"""Scores that others published, with their sources; never mixed with scores of runs of ours.

Normalised percent on the D4RL gym -v2 datasets, which are neither the embedded datasets nor
Minari's v5 ones.
"""

from dataclasses import dataclass

TASKS = tuple(
    f"{robot} {level}"
    for level in ("medium", "medium-replay", "medium-expert")
    for robot in ("halfcheetah", "hopper", "walker2d")
)


@dataclass(frozen=True)
class PublishedTable:
    """One published table.

    Attributes:
        title: What it is.
        source: Where it is from, and how sure the figures are.
        protocol: How the scores were chosen, as far as is known.
        methods: By name the scores, in the order of :data:`TASKS`, and then their average.
    """

    title: str
    source: str
    protocol: str
    methods: dict[str, tuple[str, ...]]


def _columns(names: str, rows: str) -> dict[str, tuple[str, ...]]:
    by_row = [row.split() for row in rows.strip().splitlines()]
    return dict(zip(names.split(), zip(*by_row, strict=True), strict=True))


SEQUENCE_MODELS = PublishedTable(
    title="Sequence models, as quoted by the RATE paper",
    source=(
        "The table of the RATE paper, which quotes the others: DT, Decision Transformer (arXiv "
        "2106.01345); TT, Trajectory Transformer; DMamba, Decision Mamba (arXiv 2403.19925); "
        "MambaDM (arXiv 2406.02013)."
    ),
    protocol=(
        "Which checkpoint and which target were reported differs or is not known. Decision Mamba's "
        "author says that its paper reports the maximum over the evaluations during training; a "
        "user's re-run of hopper-medium gave 55.93 ± 1.95 where the paper has 83.5 ± 12.5 "
        "(Toshihiro-Ota/decision-mamba, issue 2). Such figures are neither last scores nor best "
        "scores on fresh episodes as in this report."
    ),
    methods=_columns(
        "DT TT DMamba MambaDM RATE",
        """
        42.6 46.9 42.8±0.1 42.8 43.5
        67.6 61.1 83.5±12.5 85.7 77.4
        74.0 79.0 78.2±0.6 78.2 80.7
        36.6 41.9 39.6±0.1 39.1 39.0
        82.7 91.5 82.6±4.6 86.1 83.7
        66.6 82.6 70.9±4.3 73.4 73.7
        86.8 95.0 91.9±0.6 86.5 87.4
        107.6 110.0 111.1±0.3 110.5 112.5
        108.1 101.9 108.3±0.5 108.8 108.7
        74.7 78.9 78.8 79.0 78.5
        """,
    ),
)

CORL_LAST = PublishedTable(
    title="CORL, last scores",
    source="corl-team/CORL, README: 4 seeds, 100 episodes each.",
    protocol=(
        "Scores of the last checkpoint. CORL's averages of the best checkpoint of each run are 3 "
        "to 20 points higher: BC 70.15, 10%BC 80.65, TD3+BC 84.83, AWAC 87.80, CQL 84.68, IQL "
        "86.28, ReBRAC 93.00, SAC-N 95.60, EDAC 96.36, DT 77.49."
    ),
    methods=_columns(
        "BC 10%BC TD3+BC AWAC CQL IQL ReBRAC SAC-N EDAC DT",
        """
        42.40 42.46 48.10 50.02 47.04 48.31 64.04 68.20 67.70 42.20
        53.51 55.48 60.37 63.02 59.08 67.53 102.29 40.82 101.70 65.10
        63.23 67.34 82.71 68.52 80.75 80.91 85.82 87.47 93.36 67.63
        35.66 23.59 44.84 45.13 45.04 44.46 51.18 60.70 62.06 38.91
        29.81 70.42 64.42 98.88 95.11 97.43 94.98 100.33 99.66 81.77
        21.80 54.35 85.62 80.62 73.09 82.15 84.25 78.99 87.10 59.86
        55.95 90.10 90.78 95.00 95.63 94.74 103.80 98.96 104.76 91.55
        52.30 111.16 101.17 101.90 99.26 107.42 109.45 101.31 105.19 110.44
        98.96 108.70 110.03 111.44 109.56 111.72 111.86 114.93 114.75 107.11
        50.40 69.29 76.45 79.39 78.28 81.63 89.74 83.52 92.92 73.84
        """,
    ),
)

PUBLISHED = (SEQUENCE_MODELS, CORL_LAST)
