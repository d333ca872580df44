"""Tables, figures and one HTML page about any run: the core, which knows no study.

How a report is put together, from the bottom up:

* `subject.Subject` is a run whose path is read and calibrated once. It is a `Run`, so it goes wherever one goes.
  `calibrate(group)` puts every statistic beside its nulls, `against_nulls(describe)` does so for numbers of one's own,
  `window(lo, hi)` measures a stretch, `estimates(keys, metric)` returns what a replay measured, else what was logged.
* `sheet.Cell` keeps one number formatted and raw, a row is a mapping of cells, `sheet.tabulate` makes a `Table` of
  rows, and a table renders to CSV, Markdown and the page.
* `path_tables.NumberRow` states a row as data, and `path_tables.Rows` writes rows beside nulls and published values.
* `published.book` reads a study's published values from its YAML; a run stands beside one setting of them, `Beside`.
* `claims.Claim(said, here, null, reading)` is one claim and what became of it; `claims.claims_table` lays claims out.
* `contents.Contents` is all that a study hands to the core: sections, tables, figures, facts and words. The list of
  tasks names it (`tasks.Task.contents`); a run of no listed task has `general.GENERAL`.

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
