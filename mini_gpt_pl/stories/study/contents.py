"""What a report on runs of stories is made of."""

from __future__ import annotations

from mini_gpt_pl.report.contents import Contents, Plate
from mini_gpt_pl.report.subject import Backdrop
from mini_gpt_pl.stories.study.comparison import comparison_tables
from mini_gpt_pl.stories.study.findings import story_findings
from mini_gpt_pl.stories.study.learning_tables import LOSS, P_IN, learned
from mini_gpt_pl.stories.study.sections import COMPARISON_SECTIONS, RUN_FIGURES, RUN_SECTIONS
from mini_gpt_pl.stories.study.settings import lambda_change, story_facts
from mini_gpt_pl.stories.study.tables import run_tables
from mini_gpt_pl.stories.switches import P_OOD

CONTENTS = Contents(
    RUN_SECTIONS,
    run_tables,
    COMPARISON_SECTIONS,
    comparison_tables,
    story_findings,
    Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual, with p_ood behind."),
    facts=story_facts,
    learned=learned,
    closing={
        LOSS: "validation loss",
        P_IN: "p_in, exact match at short gaps",
        P_OOD: "p_ood, exact match at long gaps",
    },
    figures={"learning": RUN_FIGURES["learning"]},
    backdrop=Backdrop((P_OOD, "$p_{ood}$"), lambda_change, {"lm": "LM", "probe": "probe"}),
)
