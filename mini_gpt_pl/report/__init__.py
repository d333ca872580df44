"""Tables, figures and one HTML page about any run: the core, which knows no study.

From the bottom up: `subject.Subject` is a run whose path is read and calibrated once. `sheet.tabulate` makes a `Table`
of rows, mappings of cells that keep one number formatted and raw; `path_tables.Rows` writes rows beside nulls and the
published values of a study (`published.Beside`), `claims.Claim` is one claim and what became of it. All that a study
hands to the core is its `contents.Contents`, which the list of tasks names; a run of no listed task has that of
`general.GENERAL`.

Example:
    >>> from mini_gpt_pl.report.sheet import number, tabulate, word
    >>> rows = [{"group": word("head"), "PC1": number(0.81, "{:.0%}")}]
    >>> print(tabulate("shares", "Shares", rows).markdown())
    ## Shares
    <BLANKLINE>
    | group | PC1 |
    | --- | --- |
    | head | 81% |
    <BLANKLINE>
"""
