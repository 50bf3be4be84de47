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


MINIMAL_RNNS = PublishedTable(
    title="Minimal RNNs against Decision Transformer and Decision Mamba",
    source=(
        "Feng et al., “Were RNNs All We Needed?” (arXiv 2410.01201), its table of offline "
        "RL; the column DMamba is Decision Mamba (arXiv 2403.19925) as quoted by the RATE paper. "
        "The other columns were copied from memory of the paper and not checked against it: "
        "check before you cite."
    ),
    protocol=(
        "Which checkpoint and which target were reported is not known for this table. Decision "
        "Mamba's author says that its paper reports the maximum over the evaluations during "
        "training; a user's re-run of hopper-medium gave 55.93 ± 1.95 where the paper has 83.5 ± "
        "12.5 (Toshihiro-Ota/decision-mamba, issue 2). Such figures are neither last scores nor "
        "best scores on fresh episodes as in this report."
    ),
    methods=_columns(
        "DT DS4 DAaren DMamba minLSTM minGRU",
        """
        42.6 42.5 42.2 42.8±0.1 42.7±0.7 43.0±0.4
        68.4 54.2 80.9 83.5±12.5 85.0±4.4 79.4±8.2
        75.5 78.0 74.4 78.2±0.6 72.0±7.5 73.3±3.3
        37.0 15.2 37.9 39.6±0.1 38.6±1.1 38.5±1.1
        85.6 49.6 77.9 82.6±4.6 88.5±4.7 90.5±0.9
        71.2 69.0 71.4 70.9±4.3 69.7±10.7 72.8±8.9
        88.8 92.7 75.7 91.9±0.6 85.4±1.7 86.3±0.5
        109.6 110.8 103.9 111.1±0.3 110.3±1.6 109.7±2.7
        109.3 105.7 110.5 108.3±0.5 110.3±0.5 110.3±0.4
        76.4 68.6 75.0 78.8 78.1 78.2
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

PUBLISHED = (MINIMAL_RNNS, CORL_LAST)
