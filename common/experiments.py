"""What `common.compare` runs: the methods, and experiments of the papers in small.

Published figures are mIoU in percent, with the network and the data of each paper: they are there
to compare orders with, not values.
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """One row of a table.

    Attributes:
        label: what stands in the row.
        command: a script with flags.
        published: the paper's mIoU by split, where it is printed there.
        times: how many times as long as the other rows it trains.
        source: where `published` is from, if not from the table that the experiment's title names.
        against: the label of a row that it is compared with, besides the first one.
    """

    label: str
    command: str
    published: dict[str, float] | None = None
    times: int = 1
    source: str = ""
    against: str = ""

    def published_at(self, split: str) -> tuple[float | None, str]:
        """The paper's mIoU at a split, and where it is from.

        Of a paper that has one split alone it is the figure at that one, and the source says so.
        """
        found = self.published or {}
        if len(found) == 1 and split not in found:
            [(other, miou)] = found.items()
            return miou, f"{self.source} at {other}".strip()
        return found.get(split), self.source


class Experiment(NamedTuple):
    """Rows that are compared with the first one.

    Attributes:
        title: what is compared, and where it was published.
        variants: the rows.
        splits: label splits to repeat it for; empty for the one of `--split`.
        curve: a column of metrics.csv to draw over the iterations, or "".
    """

    title: str
    variants: tuple[Variant, ...]
    splits: tuple[str, ...] = ()
    curve: str = ""


FOUR = ("1/16", "1/8", "1/4", "1/2")


def at_four(*mious: float) -> dict[str, float]:
    """mIoU by split, for 1/16, 1/8, 1/4 and 1/2."""
    return dict(zip(FOUR, mious, strict=True))


# Published figures of the methods: Cityscapes, ResNet-101, in the table of U2PL's paper, whose
# authors ran CPS and AEL again. CPS's own paper has 74.72, 77.62, 79.21 and 80.21 with CutMix, so
# networks and settings matter as much as methods do.
U2PL_PUBLISHED = at_four(70.30, 74.37, 76.47, 79.05)
AEL_PUBLISHED = at_four(74.45, 75.55, 77.48, 79.01)
U2PL_AEL_PUBLISHED = at_four(74.90, 76.48, 78.51, 79.12)
METHODS = {
    "supervised": Variant("SupOnly", "supervised.py", at_four(65.74, 72.53, 74.43, 77.83)),
    "mean_teacher": Variant("Mean Teacher", "mean_teacher.py", at_four(69.03, 72.06, 74.20, 78.15)),
    "cutmix_seg": Variant(
        "CutMix-Seg", "mean_teacher.py --cutmix", at_four(67.06, 71.83, 76.36, 78.25)
    ),
    "classmix": Variant("ClassMix", "mean_teacher.py --classmix"),
    "st": Variant("ST", "stpp.py --plain"),
    "stpp": Variant("ST++", "stpp.py"),
    "u2pl": Variant("U2PL", "u2pl.py", U2PL_PUBLISHED),
    "u2pl_ael": Variant("U2PL with AEL", "u2pl.py --ael", U2PL_AEL_PUBLISHED),
    "fixmatch": Variant("FixMatch", "unimatch.py --fixmatch"),
    "unimatch": Variant(
        "UniMatch", "unimatch.py", at_four(76.6, 77.9, 79.2, 79.5), source="UniMatch's release"
    ),
    "ael": Variant("AEL", "ael.py", AEL_PUBLISHED),
    "psmt": Variant(
        "PS-MT", "psmt.py", {"1/8": 76.89, "1/4": 77.60, "1/2": 79.09}, source="PS-MT's release"
    ),
    "cps_no_cutmix": Variant("CPS without CutMix", "cps.py --no-cutmix"),
    "cps": Variant("CPS", "cps.py", at_four(69.78, 74.31, 74.58, 76.81)),
}

AEL_GAMMAS = ((0, 72.13), (0.5, 73.28), (1, 73.67), (2, 73.85), (3, 73.40))  # γ, published
EXPERIMENTS = {
    "methods": Experiment(
        "methods (published: Cityscapes, ResNet-101, U2PL's table where no other is named)",
        tuple(METHODS.values()),
    ),
    "cps-cutmix": Experiment(
        "CPS with and without CutMix (published: VOC, ResNet-101)",
        (
            Variant(
                "CPS without CutMix",
                "cps.py --no-cutmix",
                at_four(72.18, 75.83, 77.55, 78.64),
            ),
            Variant("CPS", "cps.py", at_four(74.48, 76.44, 77.68, 78.64)),
        ),
        splits=FOUR,
    ),
    "cps-weight": Experiment(
        "CutMix and the weight λ of CPS, one at a time",
        (
            Variant("without CutMix, λ = 0.5", "cps.py --no-cutmix --cps-weight 0.5"),
            Variant("without CutMix, λ = 1.5", "cps.py --no-cutmix --cps-weight 1.5"),
            Variant("CutMix, λ = 0.5", "cps.py --cps-weight 0.5"),
            Variant(
                "CutMix, λ = 1.5",
                "cps.py --cps-weight 1.5",
                against="without CutMix, λ = 1.5",
            ),
        ),
    ),
    "cps-fig5": Experiment(
        "CPS against self-training, CPS Fig. 5 "
        "(bars without numbers: CPS above self-training, more so when it trains longer)",
        (
            Variant("ST", "stpp.py --plain --retrain-times 1"),
            Variant("CPS without CutMix", "cps.py --no-cutmix"),
            Variant("CPS without CutMix, twice as long", "cps.py --no-cutmix", times=2),
            Variant("CPS", "cps.py"),
        ),
    ),
    "cps-fig7": Experiment(
        "overlap of the two networks, CPS Fig. 7 (a curve that rises)",
        (Variant("CPS without CutMix", "cps.py --no-cutmix"), Variant("CPS", "cps.py")),
        curve="overlap",
    ),
    "stpp-table5": Experiment(
        "which images to augment strongly, ST++ Table 5 (VOC, ResNet-50, 1/8)",
        (
            Variant("ST: unlabelled", "stpp.py --plain", {"1/8": 73.3}),
            Variant("ST: none", "stpp.py --plain --strong-aug none", {"1/8": 71.4}),
            Variant("ST: both", "stpp.py --plain --strong-aug both", {"1/8": 73.0}),
        ),
    ),
    "stpp-table6": Experiment(
        "what to label first, ST++ Table 6 (VOC, ResNet-50, 1/8)",
        (
            Variant("all at once (ST)", "stpp.py --plain", {"1/8": 73.3}),
            Variant("a random half", "stpp.py --selection random", {"1/8": 73.9}),
            Variant("the reliable half (ST++)", "stpp.py", {"1/8": 74.4}),
        ),
    ),
    "mixes": Experiment(
        "what is mixed, by the same teacher: nothing, a box, classes, classes of labelled images",
        (
            Variant("Mean Teacher", "mean_teacher.py"),
            Variant("box (CutMix-Seg, weight 1)", "mean_teacher.py --cutmix --unsup-weight 1"),
            Variant("classes (ClassMix)", "mean_teacher.py --classmix"),
            Variant("true classes (as DACS)", "mean_teacher.py --classmix labelled"),
        ),
    ),
    "unimatch-parts": Experiment(
        "the steps from FixMatch to UniMatch, all with τ = 0.95",
        (
            Variant("FixMatch", "unimatch.py --conf-thresh 0.95 --fixmatch"),
            Variant("two views", "unimatch.py --conf-thresh 0.95 --no-fp"),
            Variant(
                "one view and dropped features", "unimatch.py --conf-thresh 0.95 --no-second-view"
            ),
            Variant("both (UniMatch)", "unimatch.py --conf-thresh 0.95"),
            Variant("complementary dropout", "unimatch.py --conf-thresh 0.95 --complementary"),
            Variant("partner as released", "unimatch.py --conf-thresh 0.95 --partner-as-released"),
        ),
    ),
    "unimatch-threshold": Experiment(
        "from which probability a pseudo-label is kept",
        tuple(
            Variant(f"τ = {threshold}", f"unimatch.py --conf-thresh {threshold}")
            for threshold in (0, 0.7, 0.9, 0.95, 0.98)
        ),
    ),
    "ael-parts": Experiment(
        "what each part of AEL adds (published: Cityscapes, ResNet-101, 1/16)",
        (
            Variant("no part", "ael.py --no-acp --no-acm --no-aes --no-drw", {"1/16": 72.13}),
            Variant("DRW", "ael.py --no-acp --no-acm --no-aes", {"1/16": 73.85}),
            Variant("AES", "ael.py --no-acp --no-acm --no-drw", {"1/16": 74.12}),
            Variant("ACM", "ael.py --no-acp --no-aes --no-drw", {"1/16": 73.89}),
            Variant("ACP", "ael.py --no-acm --no-aes --no-drw", {"1/16": 72.64}),
            Variant("DRW, AES", "ael.py --no-acp --no-acm", {"1/16": 74.39}),
            Variant("DRW, AES, ACM", "ael.py --no-acp", {"1/16": 75.12}),
            Variant("all (AEL)", "ael.py", {"1/16": 75.83}),
        ),
    ),
    "rare-classes": Experiment(
        "AEL, U2PL with AEL and PS-MT, and what changes without some of their parts",
        (
            Variant("SupOnly", "supervised.py"),
            Variant("CutMix-Seg, weight 1", "mean_teacher.py --cutmix --unsup-weight 1"),
            Variant("AEL", "ael.py"),
            Variant("AEL without ACP", "ael.py --no-acp", against="AEL"),
            Variant("AEL without ACM", "ael.py --no-acm", against="AEL"),
            Variant("AEL without AES", "ael.py --no-aes", against="AEL"),
            Variant("AEL without DRW", "ael.py --no-drw", against="AEL"),
            Variant("AEL, on labels, too", "ael.py --labelled-consistency", against="AEL"),
            Variant("U2PL", "u2pl.py"),
            Variant("U2PL with AEL", "u2pl.py --ael", against="U2PL"),
            Variant("PS-MT", "psmt.py"),
            Variant("PS-MT, one teacher", "psmt.py --teachers 1", against="PS-MT"),
            Variant("PS-MT, ξ = 1e-6", "psmt.py --xi 1e-6", against="PS-MT"),
            Variant("PS-MT without T-VAT", "psmt.py --no-vat", against="PS-MT"),
        ),
    ),
    "ael-gamma": Experiment(
        "the exponent of the teacher's confidence (published: DRW alone, Cityscapes, 1/16)",
        tuple(
            Variant(
                f"γ = {gamma}",
                f"ael.py --no-acp --no-acm --no-aes --gamma {gamma}",
                {"1/16": published},
            )
            for gamma, published in AEL_GAMMAS
        ),
    ),
    "psmt-parts": Experiment(
        "the parts of PS-MT",
        (
            Variant("two teachers (PS-MT)", "psmt.py"),
            Variant("one teacher", "psmt.py --teachers 1"),
            Variant("without the weight κ", "psmt.py --no-conf-weight"),
            Variant("no T-VAT", "psmt.py --no-vat"),
            Variant("strong views: unlabelled", "psmt.py --strong-aug unlabelled"),
            Variant("strong views: labelled", "psmt.py --strong-aug labelled"),
            Variant("strong views: none", "psmt.py --strong-aug none"),
        ),
    ),
    "psmt-vat": Experiment(
        "the step ξ of T-VAT",
        (
            Variant("no T-VAT", "psmt.py --no-vat"),
            Variant("ξ = 1e-6: a random direction", "psmt.py --xi 1e-6"),
            Variant("ξ = 0.1", "psmt.py --xi 0.1"),
            Variant("ξ = 1", "psmt.py --xi 1"),
        ),
    ),
    "u2pl-ael": Experiment(
        "U2PL's labels and AEL's (published: Cityscapes, ResNet-101, U2PL's table)",
        (
            Variant("U2PL", "u2pl.py", U2PL_PUBLISHED),
            Variant("AEL", "ael.py", AEL_PUBLISHED),
            Variant("U2PL with AEL", "u2pl.py --ael", U2PL_AEL_PUBLISHED),
            Variant("entropy as released", "u2pl.py --ael --entropy-as-released"),
        ),
    ),
    "u2pl-table4": Experiment(
        "which unlabelled pixels are negatives, U2PL Table 4 (VOC, ResNet-101, 1/8)",
        (
            Variant("unreliable (U2PL)", "u2pl.py", {"1/8": 79.01}),
            Variant("reliable", "u2pl.py --negatives reliable", {"1/8": 77.30}),
            Variant("all", "u2pl.py --negatives all", {"1/8": 77.40}),
            Variant("none, no contrast", "u2pl.py --no-contrast"),
        ),
    ),
    "u2pl-table5": Experiment(
        "ranks of the negatives r_l, r_h, U2PL Table 5 (VOC, ResNet-101, 1/8)",
        (
            Variant("3, 20 (U2PL)", "u2pl.py", {"1/8": 79.01}),
            Variant("1, 3", "u2pl.py --low-rank 1 --high-rank 3", {"1/8": 78.57}),
            Variant("1, 20", "u2pl.py --low-rank 1 --high-rank 20", {"1/8": 78.64}),
            Variant("3, 10", "u2pl.py --low-rank 3 --high-rank 10", {"1/8": 78.27}),
            Variant("10, 20", "u2pl.py --low-rank 10 --high-rank 20", {"1/8": 78.62}),
        ),
    ),
    "u2pl-table6": Experiment(
        "components, U2PL Table 6 (VOC, ResNet-101, 1/4)",
        (
            Variant("all (U2PL)", "u2pl.py", {"1/4": 79.30}),
            Variant("no DPA", "u2pl.py --no-dpa", {"1/4": 78.49}),
            Variant("no PRT", "u2pl.py --no-prt", {"1/4": 79.07}),
            Variant("all negatives", "u2pl.py --negatives all", {"1/4": 77.57}),
            Variant("no contrast", "u2pl.py --no-contrast"),
            Variant("no contrast, no DPA", "u2pl.py --no-contrast --no-dpa", {"1/4": 73.02}),
            Variant("contrast alone", "u2pl.py --no-dpa --no-prt --negatives all", {"1/4": 77.08}),
        ),
        splits=("1/4",),
    ),
    "u2pl-table7": Experiment(
        "initial share of unreliable pixels α_0, U2PL Table 7 (VOC, ResNet-101, 1/8)",
        (
            Variant("20 % (U2PL)", "u2pl.py", {"1/8": 79.01}),
            Variant("10 %", "u2pl.py --alpha0 10", {"1/8": 77.80}),
            Variant("30 %", "u2pl.py --alpha0 30", {"1/8": 77.34}),
            Variant("40 %", "u2pl.py --alpha0 40", {"1/8": 76.77}),
        ),
    ),
}
